"""`wavenet-conv explain`: the numbers of `Scorer` and `count_nodes`, and text that fits any terminal and encoding."""

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

ODD = '\t\x9b\x7f"\\[] é\u0301\u202e\u2028漢😀'
MAPPED = Vocabulary.from_mapping(["b", ".", "<E>", "a", "é"], end="<E>")
HEADER = ["char", "prob", "bits", "surprise", "likeliest"]
BAR = 36  # columns that 80 leave for it
ESCAPES = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.fixture
def explain(run, monkeypatch):
    """Standard output and messages on a terminal of some columns, by default without colors."""

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


def table(text: str) -> list[list[int]]:
    """The numbers of a table of nodes: per column, layer by layer and in all."""
    rows = [
        [int(cell.replace(",", "")) for cell in row.split()] for row in re.findall(r"^ +(?:\d|all) (.+)", text, re.M)
    ]
    return [list(column) for column in zip(*rows)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("vocab", [Vocabulary("ab-é"), MAPPED], ids=["standard", "mapped"])
def test_json_has_the_numbers_of_the_library(explain, tmp_path, kind, vocab):
    names, path = ["ab", "", "éabab"], tmp_path / "model.safetensors"
    model = from_tree(random_tree((2, 3), n_embd=4, n_hidden=5, vocab_size=5, dtype=torch.float32, **kind))
    save_checkpoint(path, model, vocab, names=["ab", "ba", "é"])
    scorer, found = Scorer.load(path, device="cpu"), records(explain("--json", "--model", path, *names))
    values, offsets = scorer.position_log_probs(names)
    logits = scorer.logits(names)[0].double()
    for record, name, start, end in zip(found, names, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        positions = record["positions"]
        assert record["name"] == name and [position["character"] for position in positions] == [*name, None]
        assert [position["log_probability"] for position in positions] == values[start:end].tolist()
        assert record["score"] == scorer.score([name]).item()
        assert record["bits_per_character"] == scorer.bits_per_character([name]).item()
        assert record["percentile"] == scorer.percentile([name]).item()
        for position, row in zip(positions, logits[start:end].softmax(1), strict=True):
            assert position["probability"] == pytest.approx(math.exp(position["log_probability"]))
            assert position["bits"] == pytest.approx(-math.log2(position["probability"]))
            expected, tokens = row.sort(descending=True)
            likeliest = position["likeliest"]
            assert [other["probability"] for other in likeliest] == pytest.approx(expected[:3].tolist())
            assert [other["character"] or "" for other in likeliest] == [vocab.decode([t]) for t in tokens[:3].tolist()]
        for key, counted in (("nodes", [name]), ("nodes_together", names)):
            nodes = {way: tuple(layers) for way, layers in record[key].items()}
            assert nodes == count_nodes(counted, model.config)._asdict()


def test_text_shows_the_same_numbers(explain):
    text, found = explain("emma", "gemma").decode(), records(explain("--json", "emma", "gemma"))
    *blocks, together = text.split("\n\n")
    longest = max(position["bits"] for record in found for position in record["positions"])
    for block, nodes, record in zip(blocks[0::2], blocks[1::2], found, strict=True):
        heading, header, *rows, summary = block.splitlines()
        assert json.loads(heading) == record["name"] and header.split() == HEADER
        for row, position in zip(rows, record["positions"], strict=True):
            character, percent, bits, bar, *likeliest = row.split()
            assert character == (position["character"] or "end")
            assert (percent, bits) == (f"{position['probability']:.1%}", f"{position['bits']:.2f}")
            assert set(bar[:-1]) <= {"█"} and len(bar) == math.ceil(round(8 * BAR * position["bits"] / longest) / 8)
            assert likeliest[0::2] == [other["character"] or "end" for other in position["likeliest"]]
            assert likeliest[1::2] == [f"{other['probability']:.0%}" for other in position["likeliest"]]
        score, bits, percentile = record["score"], record["bits_per_character"], record["percentile"]
        assert summary == f"score {score:.4f} nats, {bits:.3f} bits per character, percentile {percentile:.1f}"
        assert table(nodes) == [[*layers, sum(layers)] for layers in record["nodes"].values()]
    assert blocks[1].startswith("nodes: the pass computes 25 and reuses 10 of the loop's 35\n")
    assert "\ndistinct nodes: 33 name by name, 26 together; names share 7\n" in together
    assert table(together) == [[*layers, sum(layers)] for layers in found[0]["nodes_together"].values()]


def test_one_name_and_a_model_without_quantiles(explain, save_random, tmp_path):
    path = save_random(tmp_path / "model.safetensors", "a")
    (record,), text = records(explain("--json", "--model", path, "")), explain("--model", path, "").decode()
    assert [position["character"] for position in record["positions"]] == [None] and record["percentile"] is None
    assert len(record["positions"][0]["likeliest"]) == 2  # as many as there are tokens
    assert text.startswith('""\nchar ') and "percentile" not in text and "together" not in text


@pytest.mark.parametrize("width", [39, 40, 60, 80, 120])
@pytest.mark.parametrize(
    ("names", "characters"),
    [
        (["emma", "xqz"], ALPHABET),
        (["a" * 3000, ""], ALPHABET),
        (["a漢字é", "漢"], "aé漢字"),
        (["é漢😀" * 3, ODD], ODD),
    ],
    ids=["ascii", "long", "wide", "odd"],
)
def test_lines_fit_and_columns_are_aligned(explain, save_random, tmp_path, names, characters, width):
    """In cells, of which wide characters take two; the end is unlikely, as its three letters would hide that."""
    path = save_random(tmp_path / "model.safetensors", characters, end=-9)
    lines, offsets = explain("--model", path, *names, width=width).decode().splitlines(), set()
    assert max(map(cell_len, lines)) <= width
    for line in lines:
        if match := re.match(r'(" "|\S+) +<?[\d.]+% +[\d.]+ ', line):
            likeliest = re.finditer(r'(" "|\S+) +<?\d+%', line[match.end() :])
            ends = [match.end(), *(match.end() + other.start() for other in likeliest)]
            offsets.add(tuple(cell_len(line[:end]) for end in ends))
    assert len(offsets) == 1 and len(offsets.pop()) > 2
    assert {len(line.split()) for line in lines if re.match(r" +(\d+|all) ", line)} == {6}


def test_a_narrow_terminal_shows_fewer_of_the_likeliest(explain):
    for width, shown in ((40, "a 13% k  9% m  8%"), (39, "a 13% k  9%"), (30, "a 13%"), (28, ""), (20, "")):
        _, header, row, *_ = explain("emma", width=width).decode().splitlines()
        assert header.endswith("likeliest") == bool(shown) and re.fullmatch(rf"e     4\.8% 4\.39 █+ *{shown}", row)


def test_odd_characters_are_written_as_in_json(explain, save_random, tmp_path):
    text = explain("--model", save_random(tmp_path / "model.safetensors", ODD + "red/"), ODD, "[red] [/]").decode()
    assert '\n"[red] [/]"\n' in text and json.loads(text.splitlines()[0]) == ODD
    for shown in ("\\t", "\\u009b", "\\u007f", '\\"', "\\\\", "\\u0301", "\\u202e", "\\u2028", '" "', "漢", "😀"):
        assert re.search(rf"^{re.escape(shown)} ", text, re.M)
    assert not {"\t", "\x9b", "\x7f", "\u202e", "\u2028"} & set(text)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_encoding_of_standard_output(explain, save_random, monkeypatch, tmp_path, encoding):
    path, stdout = save_random(tmp_path / "model.safetensors", ODD), io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    explain("--model", path, "é漢")
    text, unicode = stdout.buffer.getvalue().decode(encoding), encoding == "utf-8"
    assert text.startswith('"é漢"\n' if unicode else '"\\u00e9\\u6f22"\n') and text.isascii() != unicode
    assert ("##" in text) != unicode and ("██" in text) == unicode


def test_colors_are_for_terminals_and_change_no_text(explain):
    plain = explain("emma", "xqz")
    assert b"\x1b" not in plain and explain("emma", "xqz", FORCE_COLOR=1, NO_COLOR=1) == plain
    colored = explain("emma", "xqz", FORCE_COLOR=1)
    assert ESCAPES.sub(b"", colored) == plain
    for color, bits in ((32, b"2.30"), (33, b"4.39"), (31, b"14.56")):  # a uniform guess needs 4.75
        assert re.search(rb"%%  +%s  \x1b\[%dm" % (bits, color), colored)


def test_logits_that_are_not_finite_are_null_and_nan(explain, save_random, tmp_path):
    path = save_random(tmp_path / "model.safetensors", "ab")
    checkpoint = load_checkpoint(path)
    with torch.no_grad():
        checkpoint.model.layers[-1].norm.bias.fill_(100)  # eight times tanh(100) times 3e38 is infinite
        checkpoint.model.head.weight.fill_(3e38)
    save_checkpoint(path, checkpoint.model, checkpoint.vocab)
    (record,) = records(explain("--json", "--model", path, "a"))
    assert record["score"] is None and [position["bits"] for position in record["positions"]] == [None, None]
    assert re.search(r"^a +nan +nan +\S+ +nan", explain("--model", path, "a").decode(), re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ava", "zoë"],
            "NAME 'zoë': character 'ë' at position 2 is not in the vocabulary 'abcdefghijklmnopqrstuvwxyz'; ",
        ),
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
