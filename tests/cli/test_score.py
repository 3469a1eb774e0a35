"""`wavenet-conv score`: rows equal `Scorer` to the bit, bad lines are named, an output is replaced as a whole."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
from math import isnan

import pytest
import torch
from helpers import ALPHABET

from wavenet_conv import Scorer, Vocabulary, lines

NAMES = ["emma", "", "olivia", "x", "zzzzzzzzzzzz", "emma", "ava", "isabella", "mia", "a" * 300]


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_random) -> str:
    return save_random(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture
def score(run, model):
    return lambda *arguments, model=model: run("score", "--model", model, "--device", "cpu", *arguments)


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{name}\n" for name in NAMES))
    return path


def parse(data: bytes, format: str = "tsv") -> list[dict]:
    texts = data.decode().split("\n")[:-1]
    if format == "jsonl":
        return [json.loads(text) for text in texts]
    header, rows = texts[0].split("\t"), []
    for text in texts[1:]:
        name, *numbers = text.split("\t")
        values = [json.loads(f'"{name}"'), *map(float, numbers[:2])]
        values += [[float(number) for number in part.split(",")] for part in numbers[2:]]
        rows.append(dict(zip(header, values, strict=True)))
    return rows


def named(data: bytes, format: str = "tsv") -> list[str]:
    return [row["name"] for row in parse(data, format)]


@pytest.mark.parametrize(
    ("format", "chunk", "dtype"),
    [("tsv", 3, torch.float32), ("jsonl", 1000, torch.float32), ("tsv", 1000, torch.float64)],
)
def test_rows_have_the_scorers_bits(score, save_random, monkeypatch, tmp_path, listed, format, chunk, dtype):
    monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
    path = save_random(tmp_path / "model.safetensors", dtype=dtype)
    scorer = Scorer.load(path, device="cpu")
    code, out, err = score(listed, "--format", format, "--per-position", model=path)
    rows = parse(out, format)
    assert (code, err) == (0, "") and [row["name"] for row in rows] == NAMES
    for column, values in (("score", scorer.score(NAMES)), ("bits_per_character", scorer.bits_per_character(NAMES))):
        assert torch.equal(torch.tensor([row[column] for row in rows], dtype=dtype), values)
    assert [len(row["positions"]) for row in rows] == [len(name) + 1 for name in NAMES]
    values, _ = scorer.position_log_probs(NAMES)
    assert torch.equal(torch.tensor([value for row in rows for value in row["positions"]], dtype=dtype), values)
    short = [{name: row[name] for name in list(row)[:3]} for row in rows]
    assert parse(score(listed, "--format", format, model=path)[1], format) == short


def test_a_model_with_a_notebooks_numbers(score, save_random, tmp_path, listed):
    vocab = Vocabulary.from_mapping([*reversed(ALPHABET), "<E>", "."], end="<E>")
    path = save_random(tmp_path / "model.safetensors", vocab)
    scorer, names = Scorer.load(path, device="cpu"), [*NAMES, "o.k."]
    listed.write_text("".join(f"{name}\n" for name in names))
    code, out, err = score(listed, "--per-position", model=path)
    rows = parse(out)
    assert (code, err) == (0, "") and [row["name"] for row in rows] == names
    assert torch.equal(torch.tensor([row["score"] for row in rows]), scorer.score(names))
    values, _ = scorer.position_log_probs(names)
    assert torch.equal(torch.tensor([value for row in rows for value in row["positions"]]), values)
    code, out, err = score(listed)
    assert code == 1 and "character '.' at position 1 is not in the vocabulary" in err


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (b"emma\nava", ["emma", "ava"]),
        (b"\xef\xbb\xbfemma\r\n\r\nava\r\n", ["emma", "", "ava"]),
        (b'\n\n a b \n\t"\\\x00\nzo\xc3\xab\n', ["", "", " a b ", '\t"\\\x00', "zoë"]),
        ("a\u2028b\n\x85\na\rb\n".encode(), ["a\u2028b", "\x85", "a\rb"]),
        (b"emma\r\nxq\r", ["emma", "xq\r"]),
    ],
)
def test_each_line_is_a_row(score, monkeypatch, tmp_path, data, names):
    (tmp_path / "list.txt").write_bytes(data)
    for format, chunk in (("tsv", 1), ("jsonl", 1000)):
        monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
        code, out, _ = score(tmp_path / "list.txt", "--unknown", "nan", "--format", format)
        assert code == 0 and named(out, format) == names
    assert sorted(named(score(tmp_path / "list.txt", "--unknown", "nan", "--sort")[1])) == sorted(names)


@pytest.mark.parametrize(
    ("data", "message", "written"),
    [
        (b"ab\n" * 7 + b"ol.ivia\nab\n", "8 ('ol.ivia'): character '.' at position 2 is not in the vocabulary 'abc", 6),
        (b"\xef\xbb\xbfab\r\nb\0\r\n", "2 ('b\\x00'): character '\\x00' at position 1 is not", 0),
        (b"ab\n" * 4 + b"a\xed\n", "5: byte 0xed at byte 1 of the line is not UTF-8; save the file as UTF-8", 3),
        (b"ab\n" * 3 + b"a" * 70, "4: longer than 64 bytes; give text with one name per line", 3),
    ],
)
def test_bad_lines_are_named_and_leave_the_output(score, tmp_path, monkeypatch, data, message, written):
    monkeypatch.setattr(lines, "CHUNK_LINES", 3)
    monkeypatch.setattr(lines, "CHUNK_BYTES", 64)
    file, output = tmp_path / "list.txt", tmp_path / "out.tsv"
    file.write_bytes(data)
    code, out, err = score(file)
    assert (code, named(out)) == (1, ["ab"] * written)
    assert err.startswith(f"wavenet-conv: {file}, line {message}") and err.count("\n") == 1
    assert ("use --unknown nan" in err) == ("character" in err)
    assert score(file, "--sort")[0::2] == (1, err)
    output.write_bytes(b"earlier")
    assert score(file, "--output", output) == (1, b"", err)
    assert output.read_bytes() == b"earlier" and sorted(tmp_path.iterdir()) == [file, output]


def test_unknown_names_are_nan(score, listed):
    listed.write_text("ava\nzoë\nmia\n", encoding="utf-8")
    null = '{"name": "zoë", "score": null, "bits_per_character": null, "positions": [null]}'
    for format, row in (("tsv", "zoë\tnan\tnan\tnan"), ("jsonl", null)):
        code, out, _ = score(listed, "--unknown", "nan", "--per-position", "--format", format)
        assert code == 0 and out.decode().split("\n")[-3] == row


def test_sorted_rows_have_the_least_plausible_first(score, tmp_path, monkeypatch, names):
    some = random.Random(0).sample(names, 500)
    some[100:100] = ["o.k", *some[:3], "", "zoë"]  # unknown names and ties
    file, options = tmp_path / "list.txt", ["--unknown", "nan", "--per-position"]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(some).encode())
    rows = parse(score(file, *options)[1])
    worst = sorted(rows, key=lambda row: (not isnan(row["score"]), -row["bits_per_character"]))
    for chunk in (7, 1000):
        monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
        code, out, _ = score(file, *options, "--sort")
        assert code == 0 and repr(parse(out)) == repr(worst)  # NaN does not equal itself
    assert named(out)[:2] == ["o.k", "zoë"]
    assert score(file, *options, "--sort", "--limit", 10)[1] == b"".join(out.splitlines(keepends=True)[:11])
    reader, writer = os.pipe()
    os.write(writer, file.read_bytes())
    os.close(writer)
    with open(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert score(*options, "--sort")[1] == out
    monkeypatch.setattr(sys, "stdin", None)
    assert score() == (2, b"", "wavenet-conv: standard input is closed; give a file\n")


def test_the_limit_is_where_reading_stops(score, monkeypatch, listed):
    listed.write_bytes(b"emma\nava\nmia\n\xff\n")
    for chunk in (2, 100):
        monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
        code, out, _ = score(listed, "--limit", 3)
        assert code == 0 and named(out) == ["emma", "ava", "mia"] and score(listed, "--limit", 4)[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--above", "nan"), "nan is not a number to compare with"), (("--output", "-"), "--output -: give the name of")],
    ids=str,
)
def test_values_of_options_that_mean_nothing_are_rejected(score, listed, options, message):
    code, out, err = score(listed, *options)
    assert (code, out) == (2, b"") and message in err


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (FULL, 1, "{}: No space left on device; the file is as it was before\n"),
    ],
    ids=["Ctrl-C", "full disk"],
)
def test_an_output_is_replaced_when_it_is_whole(score, monkeypatch, tmp_path, listed, error, code, message):
    """Not by a run that fails at its end; and behind a link the link stays."""
    output, link, seen, real = tmp_path / "out.tsv", tmp_path / "link.tsv", [], Scorer.score
    output.write_bytes(b"earlier")
    link.symlink_to(output)
    monkeypatch.setattr(lines, "CHUNK_LINES", 3)
    monkeypatch.setattr(Scorer, "score", lambda *a, **o: seen.append(output.read_bytes()) or real(*a, **o))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(error))
        found, out, err = score(listed, "--output", link)
    assert (found, out) == (code, b"") and err == f"wavenet-conv: {message.format(link)}"
    assert sorted(tmp_path.iterdir()) == [link, listed, output]
    assert score(listed, "--output", link) == (0, b"", "") and seen == [b"earlier"] * 8
    assert link.is_symlink() and output.read_bytes() == score(listed)[1]
