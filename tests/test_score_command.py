"""`wavenet-conv score`: rows to the bit as `Scorer` has them, bad lines by number, an output that survives kills."""

from __future__ import annotations

import errno
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from math import isnan
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, files, score_command
from wavenet_conv.checkpoint import save_checkpoint
from wavenet_conv.cli import main
from wavenet_conv.scoring import Scorer

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
NAMES = ["emma", "", "olivia", "x", "zzzzzzzzzzzz", "emma", "ava", "isabella", "mia", "a" * 300]
COMMAND = [sys.executable, "-m", "wavenet_conv.cli", "score"]
DEADLINE = 60  # seconds; only a broken command comes near


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_random(path, seed=0)
    return str(path)


@pytest.fixture(scope="module")
def scorer(model) -> Scorer:
    return Scorer.load(model, device="cpu")


@pytest.fixture
def run(model, capsysbinary):
    """Runs the command in this process: its exit code, standard output and standard error."""

    def call(*arguments, model=model) -> tuple[int, bytes, str]:
        try:
            code = main(["score", "--model", model, "--device", "cpu", *map(str, arguments)])
        except SystemExit as wrong:
            code = wrong.code
        printed = capsysbinary.readouterr()
        return code, printed.out, printed.err.decode()

    return call


@pytest.fixture
def start(model):
    """Starts the command as a process of its own, which does not outlive the test."""
    running = []

    def call(*arguments, **options) -> subprocess.Popen:
        command = [*COMMAND, "--model", model, "--device", "cpu", *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT} | options
        running.append(subprocess.Popen(command, **options))
        return running[-1]

    yield call
    for process in running:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def listed(tmp_path) -> Path:
    return write(tmp_path / "list.txt", NAMES)


def save_random(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = ConvWaveNet(WaveNetConfig(n_embd=4, n_hidden=8, vocab_size=27))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    save_checkpoint(path, model.eval(), Vocabulary(ALPHABET))


def write(path: Path, names: list[str]) -> Path:
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return path


def parse(data: bytes, format: str) -> list[dict]:
    lines = data.decode().split("\n")[:-1]
    if format == "jsonl":
        return [json.loads(line) for line in lines]
    header, rows = lines[0].split("\t"), []
    for line in lines[1:]:
        name, *numbers = line.split("\t")
        row = {"name": json.loads(f'"{name}"'), "score": float(numbers[0]), "bits_per_character": float(numbers[1])}
        if len(numbers) == 3:
            row["positions"] = [float(number) for number in numbers[2].split(",")]
        assert list(row) == header
        rows.append(row)
    return rows


def named(data: bytes) -> list[str]:
    return [row["name"] for row in parse(data, "tsv")]


def beside(output: Path) -> tuple[Path, Path]:
    return output.with_name(f"{output.name}.partial"), output.with_name(f"{output.name}.progress")


def recorded(output: Path) -> int:
    """How many lines the run's record counts; the record is there whole or not at all."""
    try:
        return json.loads(beside(output)[1].read_bytes())["done"]["lines"]
    except FileNotFoundError:
        return -1


def wait(process: subprocess.Popen, condition) -> None:
    end = time.monotonic() + DEADLINE
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        os.sched_yield()


@pytest.mark.parametrize("format", ["tsv", "jsonl"])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_rows_have_the_scorers_bits(run, scorer, listed, format, chunk):
    for extra in ([], ["--per-position"]):
        code, out, err = run(listed, "--format", format, "--chunk", chunk, *extra)
        rows = parse(out, format)
        assert (code, err) == (0, "") and [row["name"] for row in rows] == NAMES
        assert torch.equal(torch.tensor([row["score"] for row in rows]), scorer.score(NAMES))
        bits = torch.tensor([row["bits_per_character"] for row in rows])
        assert torch.equal(bits, scorer.bits_per_character(NAMES))
    for row in rows:
        assert len(row["positions"]) == len(row["name"]) + 1
        assert row["score"] == pytest.approx(sum(row["positions"]), rel=1e-6)  # a float32 rounding
    values, _ = scorer.position_log_probs(NAMES)
    assert torch.equal(torch.tensor([value for row in rows for value in row["positions"]]), values)


def test_float64_models_lose_no_digits(run, tmp_path, listed):
    path = str(tmp_path / "double.safetensors")
    save_checkpoint(path, ConvWaveNet(WaveNetConfig(n_embd=4, n_hidden=8), dtype=torch.float64), Vocabulary(ALPHABET))
    scores = [row["score"] for row in parse(run(listed, model=path)[1], "tsv")]
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
def test_one_row_a_line(run, tmp_path, data, names):
    (tmp_path / "list.txt").write_bytes(data)
    for format in ("tsv", "jsonl"):
        for extra in ([], ["--chunk", 1], ["--sort"]):
            code, out, _ = run(tmp_path / "list.txt", "--format", format, "--unknown", "nan", *extra)
            found = [row["name"] for row in parse(out, format)]
            assert code == 0 and (found == names if "--sort" not in extra else sorted(found) == sorted(names))


def test_standard_input(run, start, listed):
    expected = run(listed)[1]
    process = start(stdin=subprocess.PIPE)
    assert process.communicate(listed.read_bytes()) == (expected, b"") and process.returncode == 0


@pytest.mark.parametrize(
    ("data", "message", "written"),
    [
        (b"ab\n" * 7 + b"ol.ivia\nab\n", "line 8 ('ol.ivia'): character '.' at position 2 is not in the vocabulary", 6),
        (
            b"ab\n" * 2 + b"zo\xc3\xab\n",
            f"line 3 ('zoë'): character 'ë' at position 2 is not in the vocab.*{ALPHABET}",
            0,
        ),
        (b"\xef\xbb\xbfab\r\nb\0\r\n", "line 2 ('b\\x00'): character '\\x00' at position 1 is not", 0),
        (b"ab\n" * 4 + b"a\xed\n", "line 5: byte 0xed at byte 1 of the line is not UTF-8; save the file as UTF-8", 3),
        (b"ab\n" * 3 + b"a" * 70, "line 4: longer than 64 bytes; give text with one name a line", 3),
    ],
)
def test_bad_lines(run, tmp_path, monkeypatch, data, message, written):
    if len(data) > 64:
        monkeypatch.setattr(score_command, "CHUNK_BYTES", 64)
    file, output = tmp_path / "list.txt", tmp_path / "out.tsv"
    file.write_bytes(data)
    code, out, err = run(file, "--chunk", 3)
    assert code == 1 and err.startswith(f"wavenet-conv: {file}, ") and err.count("\n") == 1
    for part in message.split(".*"):
        assert part in err
    assert ("use --unknown nan" in err) == ("character" in message)
    assert named(out) == ["ab"] * written
    assert run(file, "--sort")[0::2] == (1, err)
    output.write_bytes(b"earlier")
    assert run(file, "--output", output, "--chunk", 3) == (1, b"", err)
    assert output.read_bytes() == b"earlier" and not any(path.exists() for path in beside(output))


def test_unknown_names_are_nan(run, tmp_path, scorer):
    file = write(tmp_path / "list.txt", ["ava", "o.k", "mia"])
    code, out, _ = run(file, "--unknown", "nan", "--per-position")
    line = out.decode().split("\n")[2]
    assert code == 0 and line == "o.k\tnan\tnan\tnan"
    rows = parse(run(file, "--unknown", "nan", "--per-position", "--format", "jsonl")[1], "jsonl")
    assert rows[1] == {"name": "o.k", "score": None, "bits_per_character": None, "positions": [None]}
    assert [rows[0]["score"], rows[2]["score"]] == pytest.approx(scorer.score(["ava", "mia"]).tolist(), rel=1e-8)


def test_sorted_rows(run, tmp_path, monkeypatch, names):
    some = random.Random(0).sample(names, 500)
    some[100:100] = ["o.k", *some[:3], "", "zoë"]  # unknown names and ties
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(some).encode())
    rows = parse(run(file, "--unknown", "nan", "--per-position")[1], "tsv")
    worst = sorted(rows, key=lambda row: (isnan(row["score"]), -row["bits_per_character"]))  # NaN as a float never ties
    for chunk in (7, 1000):
        code, out, _ = run(file, "--unknown", "nan", "--per-position", "--sort", "--chunk", chunk)
        assert code == 0 and repr(parse(out, "tsv")) == repr(worst)
    assert named(out)[-2:] == ["o.k", "zoë"]
    header_and_ten = b"".join(out.splitlines(keepends=True)[:11])
    assert run(file, "--unknown", "nan", "--per-position", "--sort", "--limit", 10)[1] == header_and_ten
    assert run(file, "--unknown", "nan", "--per-position", "--sort", "--output", tmp_path / "out")[0] == 0
    assert (tmp_path / "out").read_bytes() == out
    with open(file) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("--unknown", "nan", "--per-position", "--sort")[1] == out


def test_the_limit_is_where_reading_stops(run, tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(b"emma\nava\nmia\n\xff\n")
    for chunk in (1, 2, 100):
        code, out, _ = run(file, "--limit", 3, "--chunk", chunk)
        assert code == 0 and named(out) == ["emma", "ava", "mia"]
    assert run(file, "--limit", 4)[0] == 1


def test_a_reader_that_has_read_enough(model):
    script = f"{' '.join(COMMAND)} names.txt --model {model} --chunk 1000 | head -n 1"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", script], cwd=ROOT, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"name\tscore\tbits_per_character\n", b"")


def test_killed_while_it_waits_for_a_stream(run, start, tmp_path, names):
    fifo, output = tmp_path / "fifo", tmp_path / "out.tsv"
    os.mkfifo(fifo)
    some = names[:1000]
    expected = run(write(tmp_path / "list.txt", some))[1]
    arguments = (fifo, "--output", output, "--chunk", 100)
    for given, lines, end in ((250, 200, signal.SIGKILL), (430, 400, signal.SIGINT)):
        process = start(*arguments)
        with open(fifo, "wb", buffering=0) as stream:
            stream.write("".join(f"{name}\n" for name in some[:given]).encode())
            wait(process, lambda lines=lines: recorded(output) >= lines)
            assert recorded(output) == lines and process.poll() is None
            if end == signal.SIGINT:
                code, _, err = run(tmp_path / "list.txt", "--output", output)
                assert code == 1 and f"{output}: another process is writing it" in err
            process.send_signal(end)
            out, err = process.communicate()
        assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL) and out == b""
        interrupted = b"wavenet-conv: interrupted; start again with the same arguments to go on\n"
        assert err == (interrupted if end == signal.SIGINT else b"") and not output.exists()
    process = start(*arguments)
    fifo.write_bytes(b"e" + "".join(f"{name}\n" for name in some).encode())
    assert b"first" in process.communicate()[1] and process.returncode == 2 and recorded(output) == 400
    process = start(*arguments)
    fifo.write_bytes("".join(f"{name}\n" for name in some).encode())
    assert process.communicate() == (b"", b"") and process.returncode == 0
    assert output.read_bytes() == expected and not any(path.exists() for path in beside(output))


def test_killed_at_any_time(run, start, tmp_path, names):
    file, output = write(tmp_path / "list.txt", names[:20_000]), tmp_path / "out.tsv"
    expected = run(file)[1]
    arguments = (file, "--output", output, "--chunk", 100)
    output.write_bytes(b"earlier")
    chance, kills = random.Random(0), 0
    for _ in range(3):
        until = max(0, recorded(output)) + chance.randrange(1, 5_000)
        process = start(*arguments)
        wait(process, lambda until=until: recorded(output) >= until)
        process.kill()
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
        assert output.read_bytes() == b"earlier"
    assert kills
    assert run(*arguments)[0] == 0 and output.read_bytes() == expected
    assert sorted(tmp_path.iterdir()) == sorted([file, output])


class Crash(BaseException):
    """The end of a process, as far as it can be had inside one."""


class Steps:
    """Every step that changes what is on the disk; the process ends at moment `crash`: two a step, before and after."""

    def __init__(self, patch: pytest.MonkeyPatch, crash: int):
        self.taken, self.crash = 0, crash
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, function):
        def step(*arguments, **options):
            self.moment()
            function(*arguments, **options)
            self.moment()

        return step

    def moment(self):
        self.taken += 1
        if self.taken == self.crash:
            raise Crash


def test_a_crash_before_and_after_every_step(run, tmp_path, listed):
    expected = run(listed)[1]
    for crash in range(1, 100):
        output = tmp_path / f"out-{crash}.tsv"
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, crash)
            try:
                run(listed, "--output", output, "--chunk", 4)
            except Crash:
                pass
        assert not output.exists() or output.read_bytes() == expected
        assert run(listed, "--output", output, "--chunk", 3)[0] == 0 and output.read_bytes() == expected
        assert not any(path.exists() for path in beside(output))
        if steps.taken < crash:
            break
    assert 20 < crash < 99  # it came past the last step


def unfinished(run, output: Path, *arguments) -> None:
    """A run that its disk failed, after its second chunk."""
    real, calls = os.fsync, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == 6:  # twice a chunk, and the first record
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        code, out, err = run(*arguments, "--output", output, "--chunk", 3)
    assert (code, out) == (1, b"") and err.startswith(f"wavenet-conv: {output}: No space left on device; ")
    assert err.count("\n") == 1 and recorded(output) == 6


def test_a_full_disk_and_going_on(run, tmp_path, listed):
    output = tmp_path / "out.tsv"
    output.write_bytes(b"earlier")
    unfinished(run, output, listed)
    (tmp_path / ".out.tsv.progress.x").write_bytes(b"{")  # as a kill leaves it that comes while the record is written
    assert output.read_bytes() == b"earlier"
    assert run(listed, "--output", output)[0] == 0 and output.read_bytes() == run(listed)[1]
    assert sorted(tmp_path.iterdir()) == sorted([listed, output])


def test_a_real_limit_on_the_size_of_files(run, tmp_path, model, names):
    file, output = write(tmp_path / "list.txt", names[:1000]), tmp_path / "out.tsv"
    script = f"ulimit -f 8; exec {' '.join(COMMAND)} {file} --model {model} --device cpu --output {output} --chunk 50"
    ended = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith(f"wavenet-conv: {output}: File too large; ")
    assert ended.stderr.count("\n") == 1 and recorded(output) > 0 and not output.exists()
    assert run(file, "--output", output)[0] == 0 and output.read_bytes() == run(file)[1]


def test_standard_output_on_a_full_disk(start, listed):
    with open("/dev/full", "wb") as full:
        process = start(listed, stdout=full)
        _, err = process.communicate()
    assert process.returncode == 1
    assert err == b"wavenet-conv: standard output: No space left on device; the rows are not complete\n"


def test_an_unfinished_output_of_another_run_is_not_touched(run, tmp_path, listed):
    output, other = tmp_path / "out.tsv", str(tmp_path / "other.safetensors")
    save_random(Path(other), seed=1)
    unfinished(run, output, listed)
    before = [path.read_bytes() for path in beside(output)]

    def refused(*arguments, **options) -> str:
        code, out, err = run(*arguments, "--output", output, **options)
        assert (code, out) == (2, b"") and err.count("\n") == 1 and not output.exists()
        assert f"delete {output}.partial and {output}.progress" in err
        assert [path.read_bytes() for path in beside(output)] == before
        return err

    assert "(format tsv there, jsonl here)" in refused(listed, "--format", "jsonl")
    assert "(unknown error there, nan here)" in refused(listed, "--unknown", "nan")
    assert "(per_position False there, True here; limit None there, 8 here)" in refused(
        listed, "--per-position", "--limit", 8
    )
    assert "(sort False there, True here)" in refused(listed, "--sort")
    assert "(model " in refused(listed, model=other)
    assert "(input " in refused(write(tmp_path / "copy.txt", NAMES))
    write(listed, [*NAMES, "ava"])
    assert "(size " in refused(listed)
    for path in beside(output):
        path.unlink()
    assert run(listed, "--output", output)[0] == 0 and len(named(output.read_bytes())) == 11


def test_files_beside_the_output_that_are_not_its_own(run, tmp_path, listed):
    output = tmp_path / "out.tsv"
    for mine in beside(output):
        mine.write_bytes(b"somebody's")
        code, _, err = run(listed, "--output", output)
        assert code == 2 and f"delete {output}.partial and {output}.progress" in err
        assert mine.read_bytes() == b"somebody's" and sorted(tmp_path.iterdir()) == sorted([listed, mine])
        mine.unlink()


def test_wrong_usage(run, tmp_path, listed, model):
    def refused(message, *arguments, code=2, **options):
        found, out, err = run(*arguments, **options)
        assert (found, out) == (code, b"") and message in err

    refused("missing.txt: No such file or directory; give a text file", tmp_path / "missing.txt")
    refused("Is a directory", tmp_path)
    refused("--model missing.safetensors: No such file or directory; give", listed, model="missing.safetensors")
    refused("list.txt: not a safetensors file", listed, model=str(listed))
    for number in ("0", "-1", "ten"):
        refused("is not an integer of at least 1", listed, "--limit", number)
    refused("invalid choice: 'csv'", listed, "--format", "csv")
    refused("is being read; give another file", listed, "--output", listed)
    refused("is being read; give another file", listed, "--output", model)
    if not torch.cuda.is_available():
        refused("--device cuda: PyTorch finds no CUDA device here", listed, "--device", "cuda")
    refused("/dev/full: not a regular file; leave --output out", listed, "--output", "/dev/full", code=1)
    refused("not a regular file", listed, "--output", tmp_path, code=1)
    refused("No such file or directory", listed, "--output", tmp_path / "missing" / "out.tsv", code=1)
    assert listed.read_text().split("\n")[:-1] == NAMES


def test_an_output_behind_a_link(run, tmp_path, listed):
    (tmp_path / "link.tsv").symlink_to(tmp_path / "out.tsv")
    assert run(listed, "--output", tmp_path / "link.tsv")[0] == 0
    assert (tmp_path / "link.tsv").is_symlink() and (tmp_path / "out.tsv").read_bytes() == run(listed)[1]


def _read(terminal: int) -> bytes:
    """What a terminal has next; nothing once its other end is closed."""
    try:
        return os.read(terminal, 100_000)
    except OSError:
        return b""


def test_progress_is_on_standard_error(run, monkeypatch, listed):
    expected = run(listed)[1]
    terminal, theirs = pty.openpty()
    with monkeypatch.context() as patch, open(theirs, "w") as stderr:
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("TERM", "xterm")
        assert run(listed)[:2] == (0, expected)
    shown = b""
    while chunk := _read(terminal):  # a terminal hands out what it has, in parts
        shown += chunk
    assert b"10 lines (100%), " in shown
    os.close(terminal)
    monkeypatch.setattr(score_command, "QUIET_SECONDS", 1e-9)
    code, out, err = run(listed, "--chunk", 4)
    assert (code, out) == (0, expected)
    assert "4 lines (4%), " in err and err.count("10 lines (100%), ") == 1 and "lines/s\n" in err


def test_help_says_what_is_resumable(run):
    code, out, _ = run("--help")
    assert code == 0 and b"killed at any moment and started again with the same arguments" in out
    assert b"40 bytes of memory a line" in b" ".join(out.split()) and b"--chunk" not in out
