"""`wavenet-conv score`: rows equal `Scorer` to the bit, bad lines are named, an output is replaced as a whole."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from math import isnan

import pytest
import torch

from wavenet_conv import Scorer, lines

NAMES = ["emma", "", "olivia", "x", "zzzzzzzzzzzz", "emma", "ava", "isabella", "mia", "a" * 300]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_random) -> str:
    return save_random(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def scorer(model) -> Scorer:
    return Scorer.load(model, device="cpu")


@pytest.fixture
def score(run, model):
    return lambda *arguments, model=model: run("score", "--model", model, "--device", "cpu", *arguments)


@pytest.fixture
def listed(tmp_path):
    return write(tmp_path / "list.txt", NAMES)


def write(path, names):
    path.write_bytes("".join(f"{name}\n" for name in names).encode())
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


def named(data: bytes) -> list[str]:
    return [row["name"] for row in parse(data)]


def fail_when_scoring(monkeypatch, error, chunk=1):
    """Makes `Scorer.score` raise an error for a chunk after others."""
    real, calls = Scorer.score, []

    def failing(self, names, **options):
        calls.append(names)
        if len(calls) > chunk:
            raise error
        return real(self, names, **options)

    monkeypatch.setattr(lines, "CHUNK_LINES", 3)
    monkeypatch.setattr(Scorer, "score", failing)


@pytest.mark.parametrize("format", ["tsv", "jsonl"])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_rows_have_the_scorers_bits(score, scorer, monkeypatch, listed, format, chunk):
    monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
    for extra in ([], ["--per-position"]):
        code, out, err = score(listed, "--format", format, *extra)
        rows = parse(out, format)
        assert (code, err) == (0, "") and [row["name"] for row in rows] == NAMES
        assert torch.equal(torch.tensor([row["score"] for row in rows]), scorer.score(NAMES))
        bits = torch.tensor([row["bits_per_character"] for row in rows])
        assert torch.equal(bits, scorer.bits_per_character(NAMES))
    assert [len(row["positions"]) for row in rows] == [len(name) + 1 for name in NAMES]
    values, _ = scorer.position_log_probs(NAMES)
    assert torch.equal(torch.tensor([value for row in rows for value in row["positions"]]), values)


def test_float64_models_lose_no_digits(score, save_random, tmp_path, listed):
    path = save_random(tmp_path / "double.safetensors", dtype=torch.float64)
    scores = [row["score"] for row in parse(score(listed, model=path)[1])]
    assert scores == Scorer.load(path, device="cpu").score(NAMES).tolist()


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (b"\n", [""]),
        (b"emma\nava", ["emma", "ava"]),
        (b"\xef\xbb\xbfemma\r\n\r\nava\r\n", ["emma", "", "ava"]),
        (b'\n\n a b \n\t"\\\x00\nzo\xc3\xab\n', ["", "", " a b ", '\t"\\\x00', "zoë"]),
        ("a\u2028b\n\x85\na\rb\n".encode(), ["a\u2028b", "\x85", "a\rb"]),
    ],
)
def test_each_line_is_a_row(score, monkeypatch, tmp_path, data, names):
    (tmp_path / "list.txt").write_bytes(data)
    for chunk in (1000, 1):
        monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
        for extra in ([], ["--sort"], ["--format", "jsonl"]):
            code, out, _ = score(tmp_path / "list.txt", "--unknown", "nan", *extra)
            found = [row["name"] for row in parse(out, "jsonl" if "jsonl" in extra else "tsv")]
            assert code == 0 and (found == names if "--sort" not in extra else sorted(found) == sorted(names))


@pytest.mark.parametrize(
    ("data", "messages", "written"),
    [
        (b"ab\n" * 7 + b"ol.ivia\nab\n", ["line 8 ('ol.ivia'): character '.' at position 2 is not in the vocab"], 6),
        (b"ab\n" * 2 + b"zo\xc3\xab\n", ["line 3 ('zoë'): character 'ë' at position 2 is not in", ALPHABET], 0),
        (b"\xef\xbb\xbfab\r\nb\0\r\n", ["line 2 ('b\\x00'): character '\\x00' at position 1 is not"], 0),
        (b"ab\n" * 4 + b"a\xed\n", ["line 5: byte 0xed at byte 1 of the line is not UTF-8; save the file as UTF-8"], 3),
        (b"ab\n" * 3 + b"a" * 70, ["line 4: longer than 64 bytes; give text with one name per line"], 3),
    ],
)
def test_bad_lines_are_named_and_leave_the_output(score, tmp_path, monkeypatch, data, messages, written):
    monkeypatch.setattr(lines, "CHUNK_LINES", 3)
    monkeypatch.setattr(lines, "CHUNK_BYTES", 64)
    file, output = tmp_path / "list.txt", tmp_path / "out.tsv"
    file.write_bytes(data)
    code, out, err = score(file)
    assert code == 1 and err.startswith(f"wavenet-conv: {file}, ") and err.count("\n") == 1
    assert all(message in err for message in messages)
    assert ("use --unknown nan" in err) == ("character" in err)
    assert named(out) == ["ab"] * written
    assert score(file, "--sort")[0::2] == (1, err)
    output.write_bytes(b"earlier")
    assert score(file, "--output", output) == (1, b"", err)
    assert output.read_bytes() == b"earlier" and sorted(tmp_path.iterdir()) == [file, output]


def test_unknown_names_are_nan(score, tmp_path, scorer):
    file = write(tmp_path / "list.txt", ["ava", "o.k", "mia"])
    code, out, _ = score(file, "--unknown", "nan", "--per-position")
    assert code == 0 and out.decode().split("\n")[2] == "o.k\tnan\tnan\tnan"
    rows = parse(score(file, "--unknown", "nan", "--per-position", "--format", "jsonl")[1], "jsonl")
    assert rows[1] == {"name": "o.k", "score": None, "bits_per_character": None, "positions": [None]}
    assert torch.equal(torch.tensor([rows[0]["score"], rows[2]["score"]]), scorer.score(["ava", "mia"]))


def test_sorted_rows_have_the_least_plausible_first(score, tmp_path, monkeypatch, names):
    some = random.Random(0).sample(names, 500)
    some[100:100] = ["o.k", *some[:3], "", "zoë"]  # unknown names and ties
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(some).encode())
    options = ["--unknown", "nan", "--per-position"]
    rows = parse(score(file, *options)[1])
    worst = sorted(rows, key=lambda row: (isnan(row["score"]), -row["bits_per_character"]))
    for chunk in (7, 1000):
        monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
        code, out, _ = score(file, *options, "--sort")
        assert code == 0 and repr(parse(out)) == repr(worst)  # NaN does not equal itself
    assert named(out)[-2:] == ["o.k", "zoë"]
    assert score(file, *options, "--sort", "--limit", 10)[1] == b"".join(out.splitlines(keepends=True)[:11])
    assert score(file, *options, "--sort", "--output", tmp_path / "out")[0] == 0
    assert (tmp_path / "out").read_bytes() == out
    with open(file) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert score(*options, "--sort")[1] == out


def test_standard_input_is_read(score, monkeypatch, listed):
    expected = score(listed)[1]
    with open(listed) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert score() == (0, expected, "")
    monkeypatch.setattr(sys, "stdin", None)
    assert score() == (2, b"", "wavenet-conv: standard input is closed; give a file\n")


def test_the_limit_is_where_reading_stops(score, monkeypatch, tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(b"emma\nava\nmia\n\xff\n")
    for chunk in (1, 2, 100):
        monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
        code, out, _ = score(file, "--limit", 3)
        assert code == 0 and named(out) == ["emma", "ava", "mia"]
    assert score(file, "--limit", 4)[0] == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "wavenet-conv: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "wavenet-conv: {}: No space left on device; the file is"),
    ],
    ids=["Ctrl-C", "full disk"],
)
def test_a_failed_run_leaves_the_old_output_and_nothing_else(
    score, monkeypatch, tmp_path, listed, error, code, message
):
    output = tmp_path / "out.tsv"
    output.write_bytes(b"earlier")
    with monkeypatch.context() as patch:
        if code == 130:
            fail_when_scoring(patch, error, chunk=2)
        else:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(error))
        found, out, err = score(listed, "--output", output)
    assert (found, out) == (code, b"") and err.startswith(message.format(output))
    assert output.read_bytes() == b"earlier" and sorted(tmp_path.iterdir()) == [listed, output]
    assert score(listed, "--output", output) == (0, b"", "") and output.read_bytes() == score(listed)[1]


def test_the_output_appears_when_it_is_whole(score, monkeypatch, tmp_path, listed):
    output, seen = tmp_path / "out.tsv", []
    real = Scorer.score
    monkeypatch.setattr(lines, "CHUNK_LINES", 3)
    monkeypatch.setattr(Scorer, "score", lambda *a, **o: seen.append(output.exists()) or real(*a, **o))
    assert score(listed, "--output", output)[0] == 0 and output.exists()
    assert seen == [False] * 4


def test_an_output_behind_a_link_keeps_the_link(score, tmp_path, listed):
    (tmp_path / "link.tsv").symlink_to(tmp_path / "out.tsv")
    assert score(listed, "--output", tmp_path / "link.tsv")[0] == 0
    assert (tmp_path / "link.tsv").is_symlink() and (tmp_path / "out.tsv").read_bytes() == score(listed)[1]


def test_wrong_usage_is_rejected_before_anything_is_written(score, tmp_path, listed, model):
    def rejected(message, *arguments, **options):
        code, out, err = score(*arguments, **options)
        assert (code, out) == (2, b"") and message in err and "Traceback" not in err

    rejected("missing.txt: No such file or directory; give a text file", tmp_path / "missing.txt")
    rejected("Is a directory", tmp_path)
    rejected("--model missing.safetensors: No such file or directory; give", listed, model="missing.safetensors")
    rejected("list.txt: not a safetensors file", listed, model=str(listed))
    for number in ("0", "-1", "ten"):
        rejected("is not an integer of at least 1", listed, "--limit", number)
    rejected("invalid choice: 'csv'", listed, "--format", "csv")
    rejected("is being read; give another one", listed, "--output", listed)
    rejected("is being read; give another one", listed, "--output", model)
    rejected("not a regular file in an existing folder", listed, "--output", tmp_path)
    rejected("not a regular file in an existing folder", listed, "--output", tmp_path / "missing" / "out.tsv")
    if not torch.cuda.is_available():
        rejected("--device cuda: PyTorch finds no CUDA device", listed, "--device", "cuda")
    assert named(score(listed)[1]) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kill", "terminate"])
def test_a_killed_run_leaves_the_old_output(score, tmp_path, model, listed, way):
    output = tmp_path / "out.tsv"
    output.write_bytes(b"earlier")
    command = [sys.executable, "-m", "wavenet_conv", "score", "--model", model, "--output", str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        process.stdin.write(b"emma\n" * 300_000)  # more than a chunk, and no end
        process.stdin.flush()
        while not list(tmp_path.glob(".out.tsv.*")) and process.poll() is None:
            os.sched_yield()
        getattr(process, way)()
    assert process.returncode < 0 and output.read_bytes() == b"earlier"
    assert score(listed, "--output", output)[0] == 0 and output.read_bytes() == score(listed)[1]
