"""A vocabulary whose end is another character than `.`, so that `.` can be in a name; and its checkpoint."""

from __future__ import annotations

import re

import pytest
import safetensors
import torch

from wavenet_conv import ConvWaveNet, Scorer, Vocabulary, WaveNetConfig, load_checkpoint, sample, save_checkpoint
from wavenet_conv.errors import NamesError

HOSTS = ["db1.example.org", "www.example.org", "a-b.c"]


def test_the_dot_is_an_ordinary_character_and_the_checkpoint_keeps_it(tmp_path):
    vocab, path = Vocabulary.from_names(HOSTS, end="$"), tmp_path / "model.safetensors"
    assert vocab == Vocabulary("".join(HOSTS), end="$") and vocab.characters == "".join(sorted({*"".join(HOSTS)}))
    assert (vocab.end, vocab.padding, vocab.is_standard) == (0, "$", False)
    assert vocab.decode(vocab.encode(HOSTS, context=3)[0]) == HOSTS
    torch.manual_seed(0)
    model = ConvWaveNet(WaveNetConfig(vocab_size=len(vocab), n_embd=4, n_hidden=8)).eval()
    save_checkpoint(path, model, vocab, names=HOSTS)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "3"  # releases before `from_mapping` reject it
    for copied in (load_checkpoint(path).vocab, eval(repr(vocab))):
        assert copied == vocab and copied.padding == "$" and repr(copied) == repr(vocab)
    scorer = Scorer.load(path)
    assert torch.equal(scorer.score(HOSTS), Scorer(model, vocab).score(HOSTS)) and scorer.percentile(HOSTS).max() < 100
    with pytest.raises(NamesError, match=r"character '\$' at position 1 is not in the vocabulary"):
        scorer.score(["a$"])
    assert any("." in name for name in sample(model, vocab, 50))


def test_an_end_that_no_name_has_changes_nothing():
    vocab = Vocabulary("ab", end="$")
    assert vocab == Vocabulary("ab") and vocab.is_standard and repr(vocab) == "Vocabulary('ab')"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Vocabulary("a$", end="$"), "'$' is the end of every name (token 0) and cannot be one of"),
        (lambda: Vocabulary("ab", end="<E>"), "end is '<E>'; it must be a single character, such as '$'"),
        (lambda: Vocabulary.from_names(["a.b", "a$"], end="$"), "name 1 ('a$'): character '$' at position 1 marks the"),
        (lambda: Vocabulary.from_names(["a.b"], end=""), "end is ''; it must be a single character"),
    ],
)
def test_ends_that_are_rejected(call, message):
    with pytest.raises(NamesError, match=re.escape(message)):
        call()
