"""Shared by the tests of the command line: the command in this process, and small random checkpoints."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import ALPHABET

from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, save_checkpoint
from wavenet_conv.cli import main
from wavenet_conv.training import Trainer


@pytest.fixture
def run(capsysbinary):
    """Runs `wavenet-conv` in this process: exit code, standard output and standard error."""

    def call(*arguments) -> tuple[int, bytes, str]:
        try:
            code = main([*map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        printed = capsysbinary.readouterr()
        return code, printed.out, printed.err.decode()

    return call


@pytest.fixture(scope="session")
def save_random():
    """Writes a random checkpoint of some characters, or of a vocabulary; it draws shorter names with a higher `end`."""

    def save(path, characters=ALPHABET, *, end=0.0, dtype=torch.float32, **saving) -> str:
        vocab = characters if isinstance(characters, Vocabulary) else Vocabulary(characters)
        generator = torch.Generator().manual_seed(0)
        model = ConvWaveNet(WaveNetConfig(n_embd=4, n_hidden=8, vocab_size=len(vocab)), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5, generator=generator)
            model.head.bias[vocab.end] += end
        save_checkpoint(path, model.eval(), vocab, **saving)
        return str(path)

    return save


@pytest.fixture
def listed(tmp_path, names):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names[:400]) + "\n")
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def train(run, listed, out):
    """Runs the command on the list; `file` and `output` replace the usual ones."""

    def call(*arguments, file=listed, output=out):
        code, printed, err = run("train", file, "-o", output, "--device", "cpu", *arguments)
        return code, printed.decode(), err

    return call


@pytest.fixture
def interrupt(monkeypatch):
    """Presses Ctrl-C in place of a step; steps are counted from 1 over all trainings."""
    advance = Trainer.advance

    def at(step):
        steps = itertools.count(1)
        monkeypatch.setattr(Trainer, "advance", lambda self: press() if next(steps) == step else advance(self))

    def press():
        raise KeyboardInterrupt

    return at
