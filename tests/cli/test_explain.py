"""`wavenet-conv explain`: the numbers of `Scorer` and `count_nodes`, and text for any terminal and encoding."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys

import pytest
import torch
from helpers import ALPHABET, KINDS, random_tree
from rich.cells import cell_len

from wavenet_conv import Scorer, Vocabulary, from_tree, load_checkpoint, save_checkpoint
from wavenet_conv.counts import count_nodes

ODD = '\t\x1b\x9b\x7f"\\[] é\u0301\u202e\u2028漢😀'
MAPPED = Vocabulary.from_mapping(["b", ".", "<E>", "a", "é"], end="<E>")


@pytest.fixture
def explain(run, monkeypatch):
    """Standard output, or the message of an error, on a terminal of some columns, by default without colors."""

    def call(*arguments, width=80, code=0, **environment):
        with monkeypatch.context() as patch:
            for name in ("FORCE_COLOR", "NO_COLOR"):
                patch.delenv(name, raising=False)
            for name, value in {"COLUMNS": width, "TERM": "xterm-256color", **environment}.items():
                patch.setenv(name, str(value))
            found, out, err = run("explain", "--device", "cpu", *arguments)
        assert found == code and (code == 0) == (err == ""), err
        return out if code == 0 else err

    return call


def records(out: bytes) -> list[dict]:
    return [json.loads(line) for line in out.decode("ascii").splitlines()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("vocab", [Vocabulary("ab-é"), MAPPED], ids=["standard", "mapped"])
def test_json_has_the_numbers_of_the_library(explain, tmp_path, kind, vocab):
    names, path = ["ab", "", "éabab"], tmp_path / "model.safetensors"
    model = from_tree(random_tree((2, 3), n_embd=4, n_hidden=5, vocab_size=5, dtype=torch.float32, **kind))
    save_checkpoint(path, model, vocab, names=["ab", "ba", "é"])
    scorer, found = Scorer.load(path, device="cpu"), records(explain("--json", "--model", path, *names))
    for record, name in zip(found, names, strict=True):
        positions, values = record["positions"], scorer.position_log_probs([name])[0].tolist()
        assert record["name"] == name and [position["character"] for position in positions] == [*name, None]
        assert [position["log_probability"] for position in positions] == values
        assert record["score"] == scorer.score([name]).item()
        assert record["bits_per_character"] == scorer.bits_per_character([name]).item()
        assert record["percentile"] == scorer.percentile([name]).item()
        for position, row in zip(positions, scorer.logits([name])[0].double().softmax(1), strict=True):
            assert position["probability"] == pytest.approx(math.exp(position["log_probability"]))
            assert position["bits"] == pytest.approx(-math.log2(position["probability"]))
            (expected, tokens), likeliest = row.sort(descending=True), position["likeliest"]
            assert [other["probability"] for other in likeliest] == pytest.approx(expected[:3].tolist())
            assert [other["character"] or "" for other in likeliest] == [vocab.decode([t]) for t in tokens[:3].tolist()]
        for key, counted in (("nodes", [name]), ("nodes_together", names)):
            nodes = {way: tuple(layers) for way, layers in record[key].items()}
            assert nodes == count_nodes(counted, model.config)._asdict()


def test_text_shows_the_same_numbers(explain):
    text, found = explain("emma", "gemma").decode(), records(explain("--json", "emma", "gemma"))
    *blocks, together = ([line.split() for line in block.splitlines()] for block in text.split("\n\n"))
    longest = max(position["bits"] for record in found for position in record["positions"])
    for (heading, _, *rows, summary), nodes, record in zip(blocks[0::2], blocks[1::2], found, strict=True):
        assert heading == [json.dumps(record["name"])]
        for (character, percent, bits, bar, *others), position in zip(rows, record["positions"], strict=True):
            assert (character, percent) == (position["character"] or "end", f"{position['probability']:.1%}")
            assert bits == f"{position['bits']:.2f}" and len(bar) == math.ceil(40 * position["bits"] / longest)
            expected = [(other["character"] or "end", f"{other['probability']:.0%}") for other in position["likeliest"]]
            assert list(zip(others[0::2], others[1::2], strict=True)) == expected
        score, bits, percentile = record["score"], record["bits_per_character"], record["percentile"]
        expected = f"score {score:.4f} nats, {bits:.3f} bits per character, percentile {percentile:.1f}"
        assert " ".join(summary) == expected and columns(nodes) == list(record["nodes"].values())
    assert together[0] == ["all", "names", "together"]
    assert columns(together[1:]) == list(found[0]["nodes_together"].values())


def columns(table: list[list[str]]) -> list[list[int]]:
    """The columns of a table of nodes; checks the sums in its last row."""
    *layers, total = ([int(cell) for cell in row[1:]] for row in table[1:])
    assert total == [sum(column) for column in zip(*layers)]
    return [list(column) for column in zip(*layers)]


def test_one_name_and_a_model_without_quantiles(explain, save_random, tmp_path):
    path = save_random(tmp_path / "model.safetensors", "a")
    (record,), text = records(explain("--json", "--model", path, "")), explain("--model", path, "").decode()
    assert [position["character"] for position in record["positions"]] == [None] and record["percentile"] is None
    assert len(record["positions"][0]["likeliest"]) == 2  # as many as there are tokens
    assert text.startswith('""\nchar ') and "percentile" not in text and "together" not in text


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("names", [["emma", "xqz"], ["a" * 3000, ""], ["é漢😀" * 3, ODD]], ids=["ascii", "long", "odd"])
def test_lines_fit_and_all_numbers_are_shown(explain, save_random, tmp_path, names, width):
    text = explain("--model", save_random(tmp_path / "model.safetensors", ALPHABET + ODD), *names, width=width).decode()
    assert max(map(cell_len, text.splitlines())) <= width
    assert len(re.findall(r'^(?:" "|\S+) +[\d.]+% +[\d.]+ ', text, re.M)) == len(names) + sum(map(len, names))
    assert len(re.findall(r"^ +(?:\d|all)(?: +[\d,]+){5}$", text, re.M)) == 3 * 4


def test_odd_characters_are_written_as_in_json(explain, save_random, tmp_path):
    path = save_random(tmp_path / "model.safetensors", ODD + "red/:smile")
    text = explain("--model", path, ODD, "[red] [/]", ":smile:", FORCE_COLOR=1, NO_COLOR=1).decode()
    assert '\n"[red] [/]"\n' in text and '\n":smile:"\n' in text and json.loads(text.splitlines()[0]) == ODD
    for shown in (*(json.dumps(c)[1:-1] for c in '\t\x1b\x9b\x7f"\\\u0301\u202e\u2028'), '" "', "[", "é", "漢", "😀"):
        assert re.search(rf"^{re.escape(shown)} ", text, re.M), shown
    assert not set("\t\x1b\x9b\x7f\u0301\u202e\u2028") & set(text)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_encoding_of_standard_output(explain, save_random, monkeypatch, tmp_path, encoding):
    path, stdout = save_random(tmp_path / "model.safetensors", ODD), io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    explain("--model", path, "é漢")
    text = stdout.buffer.getvalue().decode(encoding)
    assert text.startswith('"é漢"\n'.encode(encoding, "replace").decode(encoding)) and " bits per character\n" in text


def test_colors_are_for_terminals_and_change_no_text(explain):
    plain, colored = explain("emma", "xqz"), explain("emma", "xqz", FORCE_COLOR=1)
    assert b"\x1b" not in plain and explain("emma", "xqz", FORCE_COLOR=1, NO_COLOR=1) == plain
    assert re.sub(rb"\x1b\[[0-9;]*m", b"", colored) == plain
    for color, bits in ((32, b"2.30"), (33, b"4.39"), (31, b"14.56")):  # a uniform guess needs 4.75
        assert re.search(rb"%s \x1b\[%d[;m]" % (bits, color), colored)


def test_logits_that_are_not_finite_are_null_and_nan(explain, save_random, tmp_path):
    path = save_random(tmp_path / "model.safetensors", "ab")
    checkpoint = load_checkpoint(path)
    with torch.no_grad():
        checkpoint.model.layers[-1].norm.bias.fill_(100)  # eight times tanh(100) times 3e38 is infinite
        checkpoint.model.head.weight.fill_(3e38)
    save_checkpoint(path, checkpoint.model, checkpoint.vocab)
    (record,) = records(explain("--json", "--model", path, "a"))
    assert record["score"] is None and [position["bits"] for position in record["positions"]] == [None, None]
    assert re.search(r"^a +nan% +nan +\S+ +nan%", explain("--model", path, "a").decode(), re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ava", "zoë"], f"NAME 'zoë': character 'ë' at position 2 is not in the vocabulary '{ALPHABET}'; "),
        (["a\0"], "NAME 'a\\x00': character '\\x00' at position 1 is not in the vocabulary"),
        (["a" * 3000 + "!"], f"NAME '{'a' * 40}': character '!' at position 3000 is not"),
        (["--model", __file__, "ava"], f"--model {__file__}: not a safetensors file"),
        ([], "the following arguments are required: NAME"),
    ],
)
def test_wrong_usage(explain, arguments, message):
    for json_or_not in ([], ["--json"]):
        assert message in explain(*json_or_not, *arguments, code=2)


def test_standard_output_that_takes_no_rows(explain, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w") as closed:
        patch.setattr(sys, "stdout", closed)
        assert explain("emma") == b""
    monkeypatch.setattr(sys, "stdout", None)
    assert "standard output is closed; redirect it to a file" in explain("emma", code=1)
