"""`wavenet-conv score` with tables, compressed files and pipes, and what is said about names without a score."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
from math import nan
from threading import Timer

import pytest
import torch
from helpers import ROOT

from wavenet_conv import Scorer, lines

NAMES = ["emma", "", 'a"b,c', "olivia", " ava ", "x\ty", "Mia", "zoe\u0308", "b" * 300]


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_random, names) -> str:
    return save_random(tmp_path_factory.mktemp("model") / "model.safetensors", names=names[::50])


@pytest.fixture
def score(run, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run("score", "--model", model, "--device", "cpu", *arguments)


def table(names, delimiter=","):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([["id", "full name"], *enumerate(names)])
    return text.getvalue().encode()


def parquet(**columns) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), data := io.BytesIO(), row_group_size=4)
    return data.getvalue()


def text(names) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


SOURCES = {
    "a.txt": (text, NAMES),
    "a.txt.gz": (lambda names: gzip.compress(text(names)), NAMES),
    "a.CSV": (table, [*NAMES, "two\nlines", "\r\n"]),
    "a.csv.gz": (lambda names: gzip.compress(b"\xef\xbb\xbf" + table(names)), [*NAMES, "two\r\nlines"]),
    "a.tsv": (lambda names: table(names, "\t"), [*NAMES, "two\nlines"]),
    "a.parquet": (lambda names: parquet(id=range(len(names)), **{"full name": names}), [*NAMES, "two\nlines", None]),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("chunk", [2, 1000])
def test_every_format_gives_the_same_rows(score, model, monkeypatch, tmp_path, name, chunk):
    write, names = SOURCES[name]
    (tmp_path / name).write_bytes(write(names))
    monkeypatch.setattr(lines, "CHUNK_LINES", chunk)
    options = [name, "--unknown", "nan", "--format", "jsonl", *(["--column", "full name"] if "txt" not in name else [])]
    code, out, err = score(*options)
    rows = [json.loads(line) for line in out.decode().split("\n")[:-1]]
    assert code == 0 and [row["name"] for row in rows] == names
    known = ["." if name is None else name for name in names]  # whose score is NaN too
    expected = Scorer.load(model, device="cpu").score(known, unknown="nan")
    found = torch.tensor([nan if row["score"] is None else row["score"] for row in rows])
    assert torch.equal(found.nan_to_num(), expected.nan_to_num()) and torch.equal(found.isnan(), expected.isnan())
    assert ("missing values: 1" in err) == (None in names)
    ordered = [json.loads(line)["name"] for line in score(*options, "--sort")[1].decode().split("\n")[:-1]]
    by_bits = sorted(rows, key=lambda row: -row["bits_per_character"] if row["score"] is not None else -1e9)
    assert ordered == [row["name"] for row in by_bits]
    assert score(*options, "--limit", 3)[1].count(b"\n") == 3


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_tables_are_read_back_exactly(score, tmp_path, format):
    names = [*NAMES, "cr\rhere", "two\nlines", None]
    (tmp_path / "in.parquet").write_bytes(parquet(name=names))
    options = ["in.parquet", "--unknown", "nan", "--per-position", "--percentile"]
    expected = [json.loads(line) for line in score(*options, "--format", "jsonl")[1].splitlines()]
    assert all(0 <= row["percentile"] <= 100 for row in expected if row["score"] is not None)
    assert score(*options, "--output", f"out.{format}")[0] == 0
    if format == "parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table("out.parquet").to_pylist()
    else:
        with open("out.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row |= {key: float(row[key]) for key in row if key not in ("name", "positions")}
            row["positions"] = [float(number) for number in row["positions"].split(",")]
        expected[-1]["name"] = ""  # CSV has no missing values

    def plain(value):
        return "nan" if value is None or value != value else float(torch.tensor(value, dtype=torch.float32))

    for row, same in zip(rows, expected, strict=True):
        assert list(row) == list(same) and row.pop("name") == same.pop("name")
        assert [*map(plain, row.pop("positions"))] == [*map(plain, same.pop("positions"))]
        assert [*map(plain, row.values())] == [*map(plain, same.values())]


BAD = [
    (
        "a.csv",
        lambda: table(["emma"]),
        [],
        2,
        "a.csv: it has several columns; give --column NAME, one of: id, full name",
    ),
    ("a.csv", lambda: table(["emma"]), ["--column", "nam"], 2, "no column 'nam'; give --column NAME, one of: id, full"),
    ("a.csv", lambda: b"name,name\n", ["--column", "name"], 2, "several columns 'name'; rename all but one"),
    ("a.csv", lambda: b"", ["--column", "name"], 2, "a.csv: no header in it"),
    (
        "a.csv",
        lambda: b"n,m\nab,c\n\nab\n",
        ["--column", "n"],
        1,
        "a.csv, line 4: a row of 1 fields, but the header has 2",
    ),
    ("a.csv", lambda: b'n,m\na,b\n"b\nc,d\n', ["--column", "n"], 1, "a.csv, row from line 3: unexpected end of data"),
    ("a.csv", lambda: b"n\nemma\na\xff\n", [], 1, "a.csv, line 3: byte 0xff at byte 1 of the line is not UTF-8"),
    (
        "a.csv",
        lambda: b'n\nab\n"a\nB"\nab',
        [],
        1,
        "a.csv, line 3 ('a\\nB'): character '\\n' at position 1 is not in the",
    ),
    (
        "a.txt",
        lambda: b"emma\n",
        ["--column", "n"],
        2,
        "--column: a.txt is read as text, by its ending; columns are in",
    ),
    ("a.txt", lambda: b"emma\nMia\n", [], 1, "use --lower, or --unknown nan to score such names nan"),
    ("a.txt", lambda: parquet(name=["emma"]), [], 2, "a.txt is a Parquet file; give it as FILE, with the ending .parq"),
    (
        "a.gz",
        lambda: gzip.compress(text(NAMES))[:-9],
        [],
        1,
        "a.gz, after line 0: Compressed file ended before the end",
    ),
    (
        "a.gz",
        lambda: b"emma\n",
        [],
        1,
        "a.gz, after line 0: Not a gzipped file (b'em'); give a whole gzip file, or rem",
    ),
    ("a.parquet", lambda: b"emma\n", [], 2, "a.parquet: Parquet"),
    ("a.parquet", lambda: parquet(a=["x"], b=["y"]), [], 2, "it has several columns; give --column NAME, one of: a, b"),
    ("a.parquet", lambda: parquet(a=["x"]), ["--column", "b"], 2, "no column 'b'; give --column NAME, one of: a"),
    ("a.parquet", lambda: parquet(a=[1]), [], 2, "a.parquet: it has no column of strings, only: a"),
    ("a.parquet", lambda: parquet(a=[1], b=["x"]), ["--column", "a"], 2, "column 'a' is int64; give one of strings: b"),
    ("a.parquet", lambda: parquet(a=["x"] * 5 + [None]), [], 1, "a.parquet, row 6: a missing value; use --unknown nan"),
    (
        "a.parquet",
        lambda: parquet(a=[b"x"] * 5 + [b"a\xff"]),
        [],
        1,
        "a.parquet, row 6: byte 0xff at byte 1 is not UTF",
    ),
    ("a.txt", lambda: b"emma\n", ["--output", "b.gz"], 2, "--output b.gz: the output is not compressed"),
]


@pytest.mark.parametrize(("name", "data", "options", "code", "message"), BAD)
def test_bad_input_is_named_and_leaves_the_output(score, tmp_path, name, data, options, code, message):
    (tmp_path / name).write_bytes(data())
    output = tmp_path / "out.csv"
    output.write_bytes(b"earlier")
    found, out, err = score(name, "--output", output, *options)
    assert (found, out) == (code, b"") and err.startswith("wavenet-conv: ") and message in err and err.count("\n") == 1
    assert output.read_bytes() == b"earlier" and sorted(os.listdir()) == sorted([name, "out.csv"])


def test_parquet_is_neither_read_from_nor_written_to_a_stream(score, monkeypatch, tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(name=["emma"]))
    message = "--format parquet: a Parquet file cannot be written to standard output; give --output FILE"
    assert score("a.parquet", "--format", "parquet") == (2, b"", f"wavenet-conv: {message}\n")
    with open("a.parquet") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, err = score()
    assert code == 2 and "standard input is a Parquet file; give it as FILE" in err


def test_options_change_what_is_scored_and_not_what_is_written(score, tmp_path):
    names = [" Emma\t", "\uff41v\uff41", "\u2122", "emma"]  # fullwidth letters, and a sign that becomes upper case
    (tmp_path / "a.txt").write_bytes(text(names))
    code, out, err = score("a.txt", "--lower", "--strip", "--normalize", "NFKC", "--format", "jsonl", "--per-position")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [row["name"] for row in rows] == names
    assert rows[0]["positions"] == rows[3]["positions"]
    (tmp_path / "b.txt").write_bytes(text(["emma", "ava", "tm"]))
    plain = [json.loads(line) for line in score("b.txt", "--format", "jsonl")[1].splitlines()]
    assert [row["score"] for row in rows[:3]] == [row["score"] for row in plain]


def test_names_without_a_score_are_counted_and_explained(score, tmp_path):
    (tmp_path / "a.txt").write_text("Emma\nava \nzoe\u0308\nMIA\nmia\n" + "0123456789\n" * 3 + "\U0001f600", "utf-8")
    code, out, err = score("a.txt", "--unknown", "nan")
    assert code == 0 and out.count(b"nan\tnan") == 8
    listed = " ".join(repr(c) for c in "0123456789")
    assert err == (
        f"wavenet-conv: 8 of 9 scores are NaN; unknown characters: {listed} and 7 more; try --lower or --strip\n"
    )
    (tmp_path / "b.txt").write_text("zoe\u0308\n", "utf-8")
    err = score("b.txt", "--unknown", "nan", "--lower")[2]
    assert err == "wavenet-conv: 1 of 1 scores are NaN; unknown characters: '\\u0308'\n"
    (tmp_path / "b.txt").write_text("\ufb01n\n", "utf-8")  # a ligature
    assert score("b.txt", "--unknown", "nan")[2].endswith("'\ufb01'; try --normalize NFKC\n")


def test_a_threshold_keeps_the_rows_above_it_and_nan(score, tmp_path, names):
    (tmp_path / "a.txt").write_bytes(text([*names[::500], "Mia"]))
    options = ["a.txt", "--unknown", "nan", "--format", "jsonl", "--per-position"]
    rows = [json.loads(line) for line in score(*options)[1].splitlines()]
    bits = sorted(row["bits_per_character"] for row in rows[:-1])[len(rows) // 2]
    kept = [row for row in rows if row["score"] is None or row["bits_per_character"] > bits]
    assert 10 < len(kept) < len(rows) - 10
    assert [json.loads(line) for line in score(*options, "--above", bits)[1].splitlines()] == kept
    kept.sort(key=lambda row: -1e9 if row["score"] is None else -row["bits_per_character"])
    out = score(*options, "--above", bits, "--sort", "--limit", 5)[1]
    assert [json.loads(line) for line in out.splitlines()] == kept[:5]


def test_sigterm_leaves_the_output_and_no_other_file(score, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"emma\n")
    (tmp_path / "out.tsv").write_bytes(b"earlier")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert score("a.txt", "--output", "out.tsv")[0] == 143
    assert sorted(os.listdir()) == ["a.txt", "out.tsv"] and (tmp_path / "out.tsv").read_bytes() == b"earlier"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "first", "second"),
    [([], b"emma\nol", b"ivia\n"), (["--column", "name"], b'name\nemma\n"ol', b'ivia"\n')],
)
def test_a_pipe_that_pauses_gets_its_rows(model, options, first, second):
    command = [sys.executable, "-m", "wavenet_conv", "score", "--model", model, "--device", "cpu", *options]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout
        timer = Timer(60, process.kill)  # the test fails instead of waiting forever
        timer.start()
        process.stdin.write(first)
        assert process.stdout.readline().startswith(b"name\t") and process.stdout.readline().startswith(b"emma\t")
        process.stdin.write(second)
        assert process.stdout.readline().startswith(b"olivia\t")
        process.stdin.close()
        assert process.stdout.read() == b""
        timer.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--output", "out.tsv"], ["--sort", "--output", "out.parquet"]])
def test_memory_is_bounded(model, tmp_path, names, options):
    if options[-1].endswith("parquet"):
        pytest.importorskip("pyarrow")
    with open(tmp_path / "a.txt", "wb") as file:
        for _ in range(44):
            file.write(text(names))
    command = [sys.executable, "-m", "wavenet_conv", "score", tmp_path / "a.txt", "--model", model, *options[:-1]]
    subprocess.run([*command, tmp_path / options[-1]], cwd=ROOT, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1_000_000  # KB
