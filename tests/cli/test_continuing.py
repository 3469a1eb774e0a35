"""`wavenet-conv next` and `complete`: the numbers of the library, as JSON and as tables for any terminal."""

from __future__ import annotations

import json

import pytest
from helpers import ALPHABET
from rich.cells import cell_len

from wavenet_conv import Scorer, Vocabulary
from wavenet_conv.continuing import complete, next_characters

ODD = '\t\x1b"\\\u202e é漢😀[red]:'


@pytest.fixture
def shown(run, monkeypatch):
    """Standard output of a command, as text."""

    def call(command, *arguments, width=80):
        for name, value in {"COLUMNS": str(width), "FORCE_COLOR": "", "NO_COLOR": "", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)
        code, out, err = run(command, "--device", "cpu", *arguments)
        assert (code, err) == (0, "")
        return out.decode()

    return call


@pytest.mark.parametrize("vocab", [Vocabulary("ab-é"), Vocabulary("a.-é", end="$")], ids=["standard", "hosts"])
def test_json_has_the_numbers_of_the_library(shown, save_random, tmp_path, vocab):
    path, prefixes = save_random(tmp_path / "model.safetensors", vocab), ["a-", "", "éa"]
    scorer = Scorer.load(path)
    lines = shown("next", "--json", "--top", 3, "--model", path, "--", *prefixes).splitlines()
    for line, prefix, pairs in zip(lines, prefixes, next_characters(scorer, prefixes, 3), strict=True):
        record = json.loads(line)
        assert record == {"prefix": prefix, "next": [{"character": c, "probability": p} for c, p in pairs]}
    options = ["--width", 1, "--max-length", 6]
    lines = shown("complete", "--json", "--top", 12, *options, "--model", path, "--", *prefixes).splitlines()
    found = complete(scorer, prefixes, 12, width=1, max_length=6)
    assert found != complete(scorer, prefixes, 12, width=50, max_length=6)
    for line, prefix, pairs in zip(lines, prefixes, found, strict=True):
        assert json.loads(line) == {
            "prefix": prefix,
            "names": [{"name": name, "score": score} for name, score in pairs],
        }


def test_text_shows_the_same_numbers(shown):
    scorer, prefixes = Scorer.load(device="cpu"), ["emma", ""]
    for block, prefix, pairs in zip(
        shown("next", *prefixes).split("\n\n"), prefixes, next_characters(scorer, prefixes)
    ):
        heading, _, *rows = block.splitlines()
        expected = [[character or "end", f"{value:.1%}"] for character, value in pairs]
        assert heading == f'"{prefix}"' and [row.split()[:2] for row in rows] == expected
    for block, prefix, pairs in zip(shown("complete", *prefixes).split("\n\n"), prefixes, complete(scorer, prefixes)):
        heading, _, *rows = block.splitlines()
        assert heading == f'"{prefix}"' and [row.split() for row in rows] == [[f"{s:.4f}", name] for name, s in pairs]


@pytest.mark.parametrize("width", [40, 120])
@pytest.mark.parametrize("command", ["next", "complete"])
def test_odd_characters_and_long_prefixes_fit(shown, save_random, tmp_path, command, width):
    path = save_random(tmp_path / "model.safetensors", ALPHABET + ODD)
    text = shown(command, "--top", 30, "--model", path, ODD, "a" * 90, width=width)
    assert max(map(cell_len, text.splitlines())) <= width and not {"\x1b", "\t", "\u202e"} & {*text}
    assert len(text.splitlines()) == 2 * 32 + 1


@pytest.mark.parametrize("command", ["next", "complete"])
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["emm", "Emm"],
            1,
            f"PREFIX 'Emm': character 'E' at position 0 is not in the vocabulary '{ALPHABET}'; write 'e'",
        ),
        (["a" * 101 + "7"], 1, "character '7' at position 101 is not in the vocabulary"),
        (["--top", "0", "a"], 2, "'0' is not an integer of at least 1"),
        (["--model", __file__, "a"], 2, f"--model {__file__}: not a safetensors file"),
    ],
)
def test_errors(run, command, arguments, code, message):
    if command == "complete":
        arguments = [*arguments, "--max-length", "200"]
    found, out, err = run(command, *arguments)
    assert (found, out) == (code, b"") and message in err
    assert run("complete", "abc", "--max-length", "2")[0] == 2
