"""The numbers of `ConvWaveNet.forward`, computed faster. Each module holds one trick and says what defines it."""
