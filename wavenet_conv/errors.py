"""What can go wrong, by kind. Every message names the offending thing, where it stands and the mend.

Each class is also the built-in error that a caller would expect there, so `except ValueError` works too.
"""


class WaveNetConvError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(WaveNetConvError, ValueError):
    """A model that cannot be built: a kernel size of 0, widths that do not match the layers."""


class NamesError(WaveNetConvError, ValueError):
    """A name or a list of names that cannot be read: an unknown character, an empty file."""


class TokenError(WaveNetConvError, IndexError):
    """A token outside the vocabulary."""


class ShapeError(WaveNetConvError, ValueError):
    """Tokens of the wrong shape or dtype, or a sequence shorter than the context."""


class MappingError(WaveNetConvError, ValueError):
    """A tree that has no equal among convolutions, or a layer that the mapping does not know."""


class ModeError(WaveNetConvError, RuntimeError):
    """A model in training mode where evaluation is needed, or a training batch without a variance."""


class DownloadError(WaveNetConvError, OSError):
    """A download that broke off, or that brought something else."""


class CheckpointError(WaveNetConvError, ValueError):
    """A checkpoint that cannot be read, or that is not one of this library's."""


class OutputError(WaveNetConvError, OSError):
    """An output that cannot be written, or that belongs to another run."""


class TrainingError(WaveNetConvError, ArithmeticError):
    """A training whose loss is NaN or has exploded."""


class SamplingError(WaveNetConvError, ArithmeticError):
    """A model from whose logits nothing can be drawn, since they are NaN or infinite."""


class StateError(WaveNetConvError, ValueError):
    """A stream's state that belongs to another model or another batch."""


class UsageError(WaveNetConvError, ValueError):
    """What was asked for cannot be begun: a file or a model that is not there, an output of another run."""
