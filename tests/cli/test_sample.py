"""`wavenet-conv sample`: the names of `sample_stream`, in a stream, with the likelihoods of `Scorer` to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from hashlib import sha256
from itertools import count
from math import inf

import pytest
import torch

from wavenet_conv import ConvWaveNet, Scorer, Vocabulary, WaveNetConfig, sample_stream, sampling
from wavenet_conv import names as names_module
from wavenet_conv.checkpoint import load_checkpoint, save_checkpoint
from wavenet_conv.cli import sample as command

HEADER = b"name\tlog_likelihood\tbits_per_character\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_random) -> str:
    return save_random(tmp_path_factory.mktemp("model") / "model.safetensors", "abcé", end=-0.5)


@pytest.fixture
def sample(run, model):
    return lambda *arguments, model=model: run("sample", "--model", model, "--device", "cpu", *arguments)


@pytest.fixture
def trained(tmp_path, save_random, model):
    """A checkpoint with the notes of a training, its list, and what it draws, which is mostly in the list."""
    drawn = draw(model, 400)
    listed = list(dict.fromkeys(name for name in drawn[::2] if name))
    file = tmp_path / "list.txt"
    file.write_text("\r\n".join(listed), encoding="utf-8")
    notes = {"names": len(listed), "names_sha256": digest(listed)}
    return save_random(tmp_path / "model.safetensors", "abcé", notes=notes, end=-0.5), file, listed, drawn


def draw(path: str, n: int, **options) -> list[str]:
    checkpoint = load_checkpoint(path)
    return list(sample_stream(checkpoint.model, checkpoint.vocab, n, device="cpu", **options))


def digest(names: list[str]) -> str:
    return sha256("\n".join(names).encode()).hexdigest()


def texts(data: bytes) -> list[str]:
    return data.decode().split("\n")[:-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 7},
        {"temperature": 0.5},
        {"temperature": 0},
        {"top_k": 2},
        {"top_p": 0.4},
        {"max_length": 3},
        {"prefix": "éb"},
        {"prefix": "abcabcabcabc"},  # longer than the context
        {"prefix": "ab", "max_length": 2},
    ],
    ids=str,
)
def test_names_are_those_of_the_library(sample, model, options):
    options = {"max_length": 20} | options
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    expected = draw(model, 30, **options)
    for batch_size in ([], ["--batch-size", 1], ["--batch-size", 7]):
        code, out, err = sample("--count", 30, *arguments, *batch_size)
        assert (code, texts(out), err) == (0, expected, "")
    assert texts(sample("--count", 7, *arguments)[1]) == expected[:7]
    assert all(name.startswith(options.get("prefix", "")) for name in expected)


def test_the_first_names_of_many_are_those_of_few(sample, monkeypatch, model):
    expected = draw(model, 1500)
    for extra in ([], ["--batch-size", 700], ["--max-length", 1_000_000]):
        assert texts(sample("--count", 1500, *extra)[1]) == expected
    assert texts(sample(model="default")[1]) == draw("default", 20)
    monkeypatch.setattr(command, "FIRST_NAMES", 5)
    for some in (1, 5, 6, 40):
        assert texts(sample("--count", some)[1]) == expected[:some]


def test_likelihoods_have_the_scorers_bits(sample, model):
    """At temperature 1 whatever the names were drawn at, and also for names that were cut."""
    arguments = ["--count", 40, "--temperature", 3, "--top-k", 4, "--max-length", 4]
    names = texts(sample(*arguments)[1])
    assert any(len(name) == 4 for name in names) and any(len(name) < 4 for name in names)
    scorer = Scorer.load(model, device="cpu")
    code, out, _ = sample(*arguments, "--format", "tsv")
    rows = [text.split("\t") for text in texts(out.removeprefix(HEADER))]
    assert code == 0 and out.startswith(HEADER) and [row[0] for row in rows] == names
    for place, values in ((1, scorer.score(names)), (2, scorer.bits_per_character(names))):
        assert torch.equal(torch.tensor([float(row[place]) for row in rows]), values)
    code, out, _ = sample(*arguments, "--format", "jsonl")
    objects = [json.loads(text) for text in texts(out)]
    assert code == 0 and [list(row.values()) for row in objects] == [[n, float(s), float(b)] for n, s, b in rows]
    assert all(list(row) == ["name", "log_likelihood", "bits_per_character"] for row in objects)


def test_odd_characters_and_float64_are_written_exactly(sample, save_random, tmp_path):
    path = save_random(tmp_path / "odd.safetensors", '\t"\\\u2028é ', end=-0.5, dtype=torch.float64)
    names = draw(path, 50)
    assert set("".join(names)) == set('\t"\\\u2028é ')
    assert texts(sample("--count", 50, model=path)[1]) == names
    rows = [text.split("\t") for text in texts(sample("--count", 50, "--format", "tsv", model=path)[1])[1:]]
    assert [json.loads(f'"{name}"') for name, _, _ in rows] == names
    assert [float(score) for _, score, _ in rows] == Scorer.load(path, device="cpu").score(names).tolist()
    rows = texts(sample("--count", 50, "--format", "jsonl", model=path)[1])
    assert [json.loads(row)["name"] for row in rows] == names


def test_models_that_never_end_a_name_and_that_end_it_at_once(sample, save_random, tmp_path):
    endless = save_random(tmp_path / "endless.safetensors", "abc", end=-1e4)
    code, out, _ = sample("--max-length", 30, "--format", "tsv", model=endless)
    rows = [text.split("\t") for text in texts(out)[1:]]
    assert code == 0 and all(len(name) == 30 and float(score) < -9e3 for name, score, _ in rows)
    empty = save_random(tmp_path / "empty.safetensors", "abc", end=1e4)
    assert sample("--count", 3, model=empty) == (0, b"\n\n\n", "")
    row = json.loads(sample("--count", 1, "--format", "jsonl", model=empty)[1])
    assert row == {"name": "", "log_likelihood": 0, "bits_per_character": 0}


@pytest.mark.parametrize("format", ["txt", "tsv"])
def test_unique_names_are_written_once(sample, monkeypatch, model, format):
    expected = list(dict.fromkeys(draw(model, 400)))
    assert 40 < len(expected) < 300
    arguments = ["--count", len(expected), "--unique", "--format", format]
    code, out, _ = sample(*arguments)
    assert code == 0 and [row.split("\t")[0] for row in texts(out.removeprefix(HEADER))] == expected
    monkeypatch.setattr(command, "CHUNK_CHARACTERS", 100)
    assert sample(*arguments)[1] == out  # rows do not depend on the chunks


def test_novel_names_are_not_in_the_training_list(sample, trained):
    path, file, listed, drawn = trained
    expected = [name for name in drawn if name not in listed]
    assert 20 < len(expected) < len(drawn)
    assert texts(sample("--count", len(expected), "--novel", "--list", file, model=path)[1]) == expected
    both = list(dict.fromkeys(expected))
    assert len(both) < len(expected)
    code, out, err = sample("--count", len(both), "--novel", "--unique", "--list", file, model=path)
    assert (code, texts(out), err) == (0, both, "")


def test_novel_names_of_the_default_model(sample, lecture_list):
    code, out, _ = sample("--novel", "--count", 200, model="default")
    known = set(lecture_list)
    assert (code, texts(out)) == (0, [name for name in draw("default", 1000) if name not in known][:200])


def test_the_lectures_list_is_found_where_it_is(sample, monkeypatch, trained):
    """With another list in the place of the lecture's, which may not be on this machine."""
    path, file, listed, drawn = trained
    file.write_text("\n".join(listed), encoding="utf-8")
    monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(file))
    monkeypatch.setattr(names_module, "LECTURE_SHA256", digest(listed))
    assert texts(sample("--novel", model=path)[1]) == [name for name in drawn if name not in listed][:20]
    file.write_text("\n".join(listed[1:]), encoding="utf-8")
    code, out, err = sample("--novel", model=path)
    assert (code, out) == (2, b"") and "was trained on the lecture's list of " in err
    assert "not on this machine; give that list with --list FILE, or run wavenet-conv lecture-names once" in err


def test_training_lists_that_are_missing_or_wrong_are_rejected(sample, monkeypatch, tmp_path, trained):
    path, file, listed, _ = trained
    monkeypatch.delenv("WAVENET_CONV_LECTURE_NAMES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def rejected(message, *arguments, **options):
        code, out, err = sample("--novel", *arguments, **options)
        assert (code, out) == (2, b"") and message in err and err.count("\n") == 1

    was = f"--novel: --model {path} was trained on a list of {len(listed):,} names with SHA-256 {digest(listed)}"
    rejected(f"{was}, which is not on this machine; give that list with --list FILE\n", model=path)
    other = tmp_path / "other.txt"
    other.write_text("emma\nava\n")
    rejected(f"{was}; {other} is another list, with SHA-256 {digest(['emma', 'ava'])}", "--list", other, model=path)
    rejected("--list missing.txt: No such file or directory; give a text file", "--list", "missing.txt", model=path)
    rejected("do not say which list it was trained on; use a checkpoint that wavenet-conv train", "--list", file)
    rejected("was trained on the lecture's list of 32,033 names", model="default")
    rejected("or run wavenet-conv lecture-names once", "--list", other, model="default")


def test_the_job_fails_when_there_are_no_more_new_names(sample, monkeypatch):
    """Exactly after `GIVE_UP_DRAWS` draws without one; what has been written stays."""
    some = ["a", *["a"] * 49, "b", *["a", "b"] * 25, "c"]
    monkeypatch.setattr(command, "GIVE_UP_DRAWS", 50)
    monkeypatch.setattr(sampling, "sample_stream", lambda *_, **__: iter(some))
    code, out, err = sample("--count", 3, "--unique")
    assert (code, out) == (1, b"a\nb\n")
    assert err.startswith("wavenet-conv: no new name in 50 draws, after 2 of 3; ask for fewer with --count, ")
    assert sample("--count", 2, "--unique") == (0, b"a\nb\n", "")
    some[-2:] = ["c"]
    assert sample("--count", 3, "--unique") == (0, b"a\nb\nc\n", "")


@pytest.mark.parametrize(
    ("seconds", "characters", "most"), [(0, 1000, 1), (inf, 10, 3)], ids=["a slow model", "long names"]
)
def test_no_name_waits_for_many_others(sample, monkeypatch, seconds, characters, most):
    """Each is written before many more are drawn, so that memory is bounded and the first come at once."""
    numbers, written, write = count(1), [], command.write_output
    monkeypatch.setattr(command, "CHUNK_SECONDS", seconds)
    monkeypatch.setattr(command, "CHUNK_CHARACTERS", characters)
    monkeypatch.setattr(sampling, "sample_stream", lambda *_, **__: (f"{n:04}" for n in numbers))
    monkeypatch.setattr(command, "write_output", lambda data: written.append(data.count(b"\n")) or write(data))
    code, out, _ = sample("--count", 30)
    assert (code, texts(out)) == (0, [f"{n:04}" for n in range(1, 31)])
    assert written == [most] * (30 // most) and next(numbers) == 31


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", 0], "--count is 0; it must be at least 1"),
        (["--count", "ten"], "invalid int value: 'ten'"),
        (["--temperature", -1], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-k", 0], "top_k is 0"),
        (["--top-p", 1.5], "top_p is 1.5"),
        (["--max-length", 0], "max_length is 0"),
        (["--batch-size", 0], "is 0; it must be an integer of at least 1"),
        (["--prefix", "abd"], "character 'd' at position 2 is not in the vocabulary 'abcé'"),
        (["--prefix", "abc", "--max-length", 2], "prefix 'abc' has 3 characters and max_length is 2"),
        (["--seed", -1], "seed is -1"),
        (["--format", "csv"], "invalid choice: 'csv'"),
        (["--list", "names.txt"], "--list names.txt: it is read only with --novel"),
        (["--model", "missing"], "--model missing: No such file or directory"),
    ],
    ids=str,
)
def test_wrong_usage_is_rejected(sample, arguments, message):
    code, out, err = sample("--format", "tsv", *arguments)
    assert (code, out) == (2, b"") and message in err and "Traceback" not in err


def test_a_model_whose_logits_are_nan_fails_the_job(sample, tmp_path):
    """Its weights are finite, or else it would not load; their products are infinities of both signs."""
    model = ConvWaveNet(WaveNetConfig(n_embd=4, n_hidden=8, vocab_size=5), dtype=torch.float64).eval()
    with torch.no_grad():
        model.embedding.weight.fill_(1e200)
        weight = model.layers[0].conv.weight
        weight.copy_(torch.tensor([1e200, -1e200], dtype=weight.dtype).expand_as(weight))
    save_checkpoint(tmp_path / "wild.safetensors", model, Vocabulary("abcd"))
    code, out, err = sample("--count", 20, "--format", "tsv", model=tmp_path / "wild.safetensors")
    assert (code, out) == (1, b"") and "the logits after '........' are NaN" in err and err.count("\n") == 1


@pytest.mark.slow
def test_an_interrupted_run_has_written_what_it_drew(model):
    arguments = ["sample", "--model", model, "--device", "cpu", "--count", str(10**12)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen([sys.executable, "-m", "wavenet_conv", *arguments], **pipes) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate()
    assert process.returncode == 130 and texts(err)[-1] == "wavenet-conv: interrupted"
    names = texts(first + rest)
    assert names[:100] == draw(model, 100)[: len(names)]
