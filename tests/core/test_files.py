"""Errors of a file that is written beside its target name the target and its folder, not the temporary file."""

from __future__ import annotations

import re

import pytest

from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, save_checkpoint
from wavenet_conv.errors import OutputError


@pytest.mark.parametrize(
    ("target", "found"), [("missing/model", "No such file or directory"), ("file/model", "Not a directory")]
)
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, target, found):
    (tmp_path / "file").touch()
    path = tmp_path / target
    message = f"{path}: {found} in the folder {str(path.parent)!r}; give a folder that exists and can be written to"
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        save_checkpoint(path, ConvWaveNet(WaveNetConfig(vocab_size=3, n_embd=1, n_hidden=1)), Vocabulary("ab"))
