"""`wavenet-conv sample`: the names of `sample_stream`, streamed; likelihoods to the bit as `Scorer` has them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from hashlib import sha256
from itertools import count
from math import inf
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import wavenet_conv.names
from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, sample_command, score_command
from wavenet_conv.checkpoint import load_checkpoint, save_checkpoint
from wavenet_conv.cli import main
from wavenet_conv.sampling import sample_stream
from wavenet_conv.scoring import Scorer

COMMAND = [sys.executable, "-m", "wavenet_conv.cli", "sample"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
HEADER = b"name\tlog_likelihood\tbits_per_character\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_random(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture
def run(model, capsysbinary, monkeypatch):
    """Runs the command in this process: its exit code, standard output and standard error, which has no progress."""
    monkeypatch.setattr(score_command, "QUIET_SECONDS", inf)

    def call(*arguments, model=model) -> tuple[int, bytes, str]:
        try:
            code = main(["sample", "--model", str(model), "--device", "cpu", *map(str, arguments)])
        except SystemExit as wrong:
            code = wrong.code
        printed = capsysbinary.readouterr()
        return code, printed.out, printed.err.decode()

    return call


@pytest.fixture
def trained(tmp_path) -> tuple[str, Path, list[str]]:
    """A checkpoint with the notes of a training, its list, and what it draws: most of that is in the list."""
    names = drawn(save_random(tmp_path / "without-notes"), 400)
    listed = list(dict.fromkeys(name for name in names[::2] if name))
    file = tmp_path / "list.txt"
    file.write_text("\r\n".join(listed), encoding="utf-8")
    notes = {"names": len(listed), "names_sha256": digest(listed)}
    return save_random(tmp_path / "model.safetensors", notes=notes), file, names


def save_random(path: Path, characters="abcé", notes=None, end=-0.5) -> str:
    """Saves a model that draws short names where `end` is high, and never ends one where it is very low."""
    generator = torch.Generator().manual_seed(0)
    model = ConvWaveNet(WaveNetConfig(n_embd=4, n_hidden=8, vocab_size=len(characters) + 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
        model.head.bias[0] += end
    save_checkpoint(path, model.eval(), Vocabulary(characters), notes)
    return str(path)


def drawn(path: str, n: int, **options) -> list[str]:
    checkpoint = load_checkpoint(path)
    return list(sample_stream(checkpoint.model, checkpoint.vocab, n, device="cpu", **options))


def digest(names: list[str]) -> str:
    return sha256("\n".join(names).encode()).hexdigest()


def lines(data: bytes) -> list[str]:
    return data.decode().split("\n")[:-1]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--seed", 7], {"seed": 7}),
        (["--temperature", 0.5], {"temperature": 0.5}),
        (["--temperature", 0], {"temperature": 0}),
        (["--top-k", 2], {"top_k": 2}),
        (["--top-p", 0.4], {"top_p": 0.4}),
        (["--max-length", 3], {"max_length": 3}),
        (["--prefix", "éb"], {"prefix": "éb"}),
        (["--prefix", "abcabcabcabc"], {"prefix": "abcabcabcabc"}),  # longer than the context
        (["--prefix", "ab", "--max-length", 2], {"prefix": "ab", "max_length": 2}),
    ],
    ids=str,
)
def test_the_names_are_those_of_the_library(run, model, arguments, options):
    arguments, options = ["--max-length", 20, *arguments], {"max_length": 20} | options
    expected = drawn(model, 30, **options)
    for batch in ([], ["--batch", 1], ["--batch", 7]):
        code, out, err = run("--count", 30, *arguments, *batch)
        assert (code, lines(out), err) == (0, expected, "")
    assert lines(run("--count", 7, *arguments)[1]) == expected[:7]
    assert all(name.startswith(options.get("prefix", "")) for name in expected)


def test_many_names_are_the_same_ones(run, monkeypatch, model):
    """The first are drawn apart, many are drawn another way than few, and of long ones fewer are drawn together."""
    expected = drawn(model, 1500)
    assert lines(run("--count", 1500)[1]) == expected
    assert max(map(len, expected)) < 100  # so that none is cut
    assert lines(run("--count", 1500, "--max-length", 1_000_000)[1]) == expected
    assert lines(run("--count", 1500, "--batch", 700)[1]) == expected
    monkeypatch.setattr(sample_command, "FIRST", 5)
    for some in (1, 5, 6, 40):
        assert lines(run("--count", some)[1]) == expected[:some]


def test_twenty_names_of_the_default_model(run):
    code, out, err = run(model="default")
    assert (code, err, len(lines(out))) == (0, "", 20)
    assert lines(out) == drawn("default", 20)


def test_likelihoods_have_the_scorers_bits(run, model):
    """At temperature 1 whatever they were drawn at, and also for names that were cut."""
    arguments = ["--count", 40, "--temperature", 3, "--top-k", 4, "--max-length", 4]
    names = lines(run(*arguments)[1])
    assert any(len(name) == 4 for name in names) and any(len(name) < 4 for name in names)
    scorer = Scorer.load(model, device="cpu")
    expected = [scorer.score(names), scorer.bits_per_character(names)]
    code, out, _ = run(*arguments, "--format", "tsv")
    rows = [line.split("\t") for line in lines(out)]
    assert code == 0 and rows.pop(0) == ["name", "log_likelihood", "bits_per_character"]
    assert [row[0] for row in rows] == names
    for place, values in enumerate(expected, start=1):
        assert torch.equal(torch.tensor([float(row[place]) for row in rows]), values)
    code, out, _ = run(*arguments, "--format", "jsonl")
    objects = [json.loads(line) for line in lines(out)]
    assert code == 0 and [list(row.values()) for row in objects] == [[n, float(s), float(b)] for n, s, b in rows]
    assert all(list(row) == ["name", "log_likelihood", "bits_per_character"] for row in objects)


def test_odd_characters(run, tmp_path):
    path = save_random(tmp_path / "odd.safetensors", characters='\t"\\\u2028é ')
    names = drawn(path, 50)
    assert set("".join(names)) == set('\t"\\\u2028é ')
    assert lines(run("--count", 50, model=path)[1]) == names
    rows = lines(run("--count", 50, "--format", "tsv", model=path)[1])[1:]
    assert all(row.count("\t") == 2 for row in rows)
    assert [json.loads(f'"{row.split(chr(9))[0]}"') for row in rows] == names
    rows = lines(run("--count", 50, "--format", "jsonl", model=path)[1])
    assert [json.loads(row)["name"] for row in rows] == names


def test_float64_models_lose_no_digits(run, tmp_path):
    path = tmp_path / "double.safetensors"
    save_checkpoint(path, ConvWaveNet(WaveNetConfig(n_embd=4, n_hidden=8), dtype=torch.float64), Vocabulary(ALPHABET))
    names = drawn(str(path), 20, max_length=6)
    rows = lines(run("--format", "tsv", "--max-length", 6, model=path)[1])[1:]
    assert [row.split("\t")[0] for row in rows] == names
    assert [float(row.split("\t")[1]) for row in rows] == Scorer.load(path, device="cpu").score(names).tolist()


def test_models_that_never_end_a_name_and_that_end_it_at_once(run, tmp_path):
    endless = save_random(tmp_path / "endless.safetensors", end=-1e4)
    code, out, _ = run("--max-length", 30, "--format", "tsv", model=endless)
    rows = [line.split("\t") for line in lines(out)[1:]]
    assert code == 0 and all(len(name) == 30 and float(score) < -9e3 for name, score, _ in rows)
    empty = save_random(tmp_path / "empty.safetensors", end=1e4)
    assert run("--count", 3, model=empty) == (0, b"\n\n\n", "")
    row = json.loads(run("--count", 1, "--format", "jsonl", model=empty)[1])
    assert row == {"name": "", "log_likelihood": 0, "bits_per_character": 0}


def test_unique_names(run, model):
    expected = list(dict.fromkeys(drawn(model, 400)))
    some = len(expected)
    assert 40 < some < 300  # so that there is something to leave out
    for format in ("txt", "tsv"):
        code, out, _ = run("--count", some, "--unique", "--format", format)
        found = lines(out)[format == "tsv" :]
        assert code == 0 and [row.split("\t")[0] for row in found] == expected


def test_novel_names(run, trained):
    path, file, names = trained
    listed = set(file.read_text(encoding="utf-8").split("\n"))
    expected = [name for name in names if name not in listed]
    assert 20 < len(expected) < 200
    assert lines(run("--count", len(expected), "--novel", "--list", file, model=path)[1]) == expected
    both = list(dict.fromkeys(expected))
    assert len(both) < len(expected)
    code, out, err = run("--count", len(both), "--novel", "--unique", "--list", file, model=path)
    assert (code, lines(out), err) == (0, both, "")


def test_novel_names_of_a_model_that_the_train_command_wrote(run, tmp_path, names):
    file, path = tmp_path / "names.txt", tmp_path / "model.safetensors"
    file.write_text("\n".join(names[:100]))
    small = ["--n-embd", "4", "--n-hidden", "8", "--steps", "4", "--every", "4"]
    assert main(["train", str(file), "-o", str(path), *small]) == 0
    run("--count", 1)  # takes what the training has said
    code, out, _ = run("--novel", "--list", file, "--max-length", 3, "--count", 300, model=path)
    expected = [name for name in drawn(path, 400, max_length=3) if name not in names[:100]][:300]
    assert (code, lines(out)) == (0, expected)


def test_novel_names_of_the_default_model(run, lecture_list):
    code, out, _ = run("--novel", "--count", 200, model="default")
    expected = [name for name in drawn("default", 1000) if name not in set(lecture_list)][:200]
    assert (code, lines(out)) == (0, expected)


def test_the_lectures_list_is_found_where_it_is(run, monkeypatch, trained):
    """With a list in the lecture's place, which may not be on this machine."""
    path, file, names = trained
    listed = file.read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join(listed), encoding="utf-8")
    monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(file))
    for module in (wavenet_conv.names, sample_command):
        monkeypatch.setattr(module, "LECTURE_SHA256", digest(listed))
    expected = [name for name in names if name not in set(listed)][:20]
    assert lines(run("--novel", model=path)[1]) == expected
    file.write_text("\n".join(listed[1:]), encoding="utf-8")
    code, out, err = run("--novel", model=path)
    assert (code, out) == (2, b"") and "was trained on the lecture's list of " in err
    assert "not here; give that list with --list FILE, or run wavenet-conv lecture-names once" in err


def test_training_lists_that_cannot_be_had(run, monkeypatch, tmp_path, trained):
    path, file, _ = trained
    monkeypatch.delenv("WAVENET_CONV_LECTURE_NAMES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refused(message, *arguments, **options):
        code, out, err = run("--novel", *arguments, **options)
        assert (code, out) == (2, b"") and message in err and err.count("\n") == 1

    size, wanted = len(file.read_text(encoding="utf-8").split("\n")), load_checkpoint(path).notes["names_sha256"]
    was = f"--novel: --model {path} was trained on a list of {size:,} names with SHA-256 {wanted}"
    refused(f"{was}, which is not here; give that list with --list FILE\n", model=path)
    other = tmp_path / "other.txt"
    other.write_text("emma\nava\n")
    found = digest(["emma", "ava"])
    refused(f"{was}; {other} is another, with SHA-256 {found}; give", "--list", other, model=path)
    refused("--list missing.txt: No such file or directory; give a text file", "--list", "missing.txt", model=path)
    refused("do not say which list it was trained on; take a checkpoint that wavenet-conv train", "--list", file)
    lecture = "was trained on the lecture's list of 32,033 names"
    refused(lecture, model="default")
    refused("or run wavenet-conv lecture-names once", "--list", other, model="default")


def test_when_there_are_no_more_new_names(run, monkeypatch):
    """Exactly after `GIVE_UP` draws without one; what has been written stays."""
    some = ["a", *["a"] * 49, "b", *["a", "b"] * 25, "c"]
    monkeypatch.setattr(sample_command, "GIVE_UP", 50)
    monkeypatch.setattr(sample_command, "sample_stream", lambda *_, **__: iter(some))
    code, out, err = run("--count", 3, "--unique")
    assert (code, out) == (1, b"a\nb\n")
    assert err.startswith("wavenet-conv: no new name in 50 draws, after 2 of 3; ask for fewer with --count, ")
    assert run("--count", 2, "--unique") == (0, b"a\nb\n", "")
    some[-2:] = ["c"]
    assert run("--count", 3, "--unique") == (0, b"a\nb\nc\n", "")


def test_an_argmax_has_one_new_name(run, monkeypatch, model):
    monkeypatch.setattr(sample_command, "GIVE_UP", 300)
    code, out, err = run("--count", 2, "--unique", "--temperature", 0, "--max-length", 5)
    assert (code, lines(out)) == (1, drawn(model, 1, temperature=0, max_length=5))
    assert "no new name in 300 draws, after 1 of 2" in err


@pytest.mark.parametrize(
    ("seconds", "characters", "most"), [(0, 1000, 1), (inf, 10, 3)], ids=["a slow model", "long names"]
)
def test_no_name_waits_for_many_others(run, monkeypatch, seconds, characters, most):
    """Each is written before many more are drawn, so that memory is bounded and the first come at once."""
    numbers, waiting = count(1), []
    write = score_command.StandardOutput.write

    def watched(sink, data):
        write(sink, data)
        waiting.append(data.count(b"\n"))

    monkeypatch.setattr(sample_command, "CHUNK_SECONDS", seconds)
    monkeypatch.setattr(sample_command, "CHUNK_CHARACTERS", characters)
    monkeypatch.setattr(sample_command, "sample_stream", lambda *_, **__: (f"{n:04}" for n in numbers))
    monkeypatch.setattr(score_command.StandardOutput, "write", watched)
    code, out, _ = run("--count", 30)
    assert (code, lines(out)) == (0, [f"{n:04}" for n in range(1, 31)])
    assert waiting == [most] * (30 // most) and next(numbers) == 31


def test_rows_do_not_depend_on_the_chunks(run, monkeypatch):
    arguments = ["--count", 50, "--format", "tsv", "--unique"]
    expected = run(*arguments)[1]
    monkeypatch.setattr(sample_command, "CHUNK_SECONDS", 0)
    assert run(*arguments)[1] == expected and expected.startswith(HEADER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", 0], "--count is 0; it must be at least 1"),
        (["--count", "ten"], "invalid int value: 'ten'"),
        (["--temperature", -1], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
        (["--top-k", 0], "top_k is 0"),
        (["--top-p", 0], "top_p is 0.0"),
        (["--top-p", 1.5], "top_p is 1.5"),
        (["--max-length", 0], "max_length is 0"),
        (["--batch", 0], "batch is 0"),
        (["--prefix", "abd"], "character 'd' at position 2 is not in the vocabulary 'abcé'"),
        (["--prefix", "a.b"], "character '.' at position 1 is not in the vocabulary"),
        (["--prefix", "abc", "--max-length", 2], "prefix 'abc' has 3 characters and max_length is 2"),
        (["--seed", -1], "seed is -1"),
        (["--format", "csv"], "invalid choice: 'csv'"),
        (["--list", "names.txt"], "--list names.txt: it is read for --novel only"),
    ],
    ids=str,
)
def test_wrong_usage(run, arguments, message):
    code, out, err = run(*arguments, "--format", "tsv") if "--format" not in arguments else run(*arguments)
    assert (code, out) == (2, b"") and message in err and "Traceback" not in err


def test_models_that_cannot_be_read(run, tmp_path):
    (tmp_path / "list.txt").write_text("emma\n")
    for model, message in (("missing", "No such file or directory"), ("list.txt", "truncated")):
        code, out, err = run(model=tmp_path / model)
        assert (code, out) == (2, b"") and f"--model {tmp_path / model}: {message}" in err
    if not torch.cuda.is_available():
        code, out, err = run("--device", "cuda")
        assert (code, out) == (2, b"") and "--device cuda: PyTorch finds no CUDA device here" in err


def test_a_model_whose_logits_are_nan(run, tmp_path):
    """Its weights are finite, else it could not be loaded, and their products are infinities of both signs."""
    model = ConvWaveNet(WaveNetConfig(n_embd=4, n_hidden=8, vocab_size=5), dtype=torch.float64).eval()
    with torch.no_grad():
        model.embedding.weight.fill_(1e200)
        model.layers[0].conv.weight.copy_(
            torch.tensor([1e200, -1e200], dtype=torch.float64).expand_as(model.layers[0].conv.weight)
        )
    save_checkpoint(tmp_path / "wild.safetensors", model, Vocabulary("abcd"))
    for number in (20, 5000):
        code, out, err = run("--count", number, "--format", "tsv", model=tmp_path / "wild.safetensors")
        assert (code, out) == (1, b"") and "the logits after '........' are NaN" in err and err.count("\n") == 1


def test_a_reader_that_has_read_enough(run, model):
    script = f"{' '.join(COMMAND)} --model {model} --device cpu --count 1000000000000 --format tsv | head -n 3"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", script], cwd=ROOT, capture_output=True)
    assert (ended.returncode, ended.stdout) == (0, run("--count", 2, "--format", "tsv")[1])
    assert said(ended.stderr) == []


def said(err: bytes) -> list[str]:
    """What a process has said on standard error, but for its progress: a slow machine has time to report some."""
    return [line for line in lines(err) if not line.endswith(" lines/s")]


def test_interrupted(model):
    command = [*COMMAND, "--model", model, "--device", "cpu", "--count", str(10**12)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, bufsize=0) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate()
    assert process.returncode == 130 and said(err) == ["wavenet-conv: interrupted"]
    names = lines(first + rest)
    assert names[:100] == drawn(model, 100)[: len(names)]


def test_standard_output_that_is_full_or_closed(run, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        full_disk = "wavenet-conv: standard output: No space left on device; the rows are not complete\n"
        assert run() == (1, b"", full_disk)
    monkeypatch.setattr(sys, "stdout", None)
    assert run() == (1, b"", "wavenet-conv: standard output is closed; redirect it to a file\n")


def test_progress_is_on_standard_error(run, monkeypatch):
    expected = run("--count", 6)[1]
    monkeypatch.setattr(score_command, "QUIET_SECONDS", 1e-9)
    monkeypatch.setattr(sample_command, "CHUNK_SECONDS", 0)
    code, out, err = run("--count", 6)
    assert (code, out) == (0, expected)
    assert "1 lines (17%), " in err and err.count("6 lines (100%), ") == 1 and "lines/s\n" in err


def test_help_says_what_takes_memory(run):
    code, out, _ = run("--help")
    text = b" ".join(out.split())
    assert code == 0 and b"keeps every written name in memory" in text and b"after 100,000 draws" in text
