"""`wavenet-conv sample`: the names of `sample_stream`, in a stream, with the likelihoods of `Scorer` to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from wavenet_conv import Scorer, Vocabulary, sample_stream, sampling
from wavenet_conv import names as names_module
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.cli import sample as command
from wavenet_conv.errors import SamplingError
from wavenet_conv.names import sha256_of

COLUMNS = ["name", "log_likelihood", "bits_per_character"]
ODD = '\t"\\\u2028é '


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_random) -> str:
    return save_random(tmp_path_factory.mktemp("model") / "model.safetensors", "abcé", end=-0.5)


@pytest.fixture
def sample(run, model):
    return lambda *arguments, model=model: run("sample", "--model", model, "--device", "cpu", *arguments)


@pytest.fixture
def trained(tmp_path, save_random, model):
    """A checkpoint with the notes of a training, its list, and what it draws, which is mostly in the list."""
    drawn, file = draw(model, 400), tmp_path / "list.txt"
    listed = list(dict.fromkeys(name for name in drawn[::2] if name))
    file.write_text("\n".join(listed), encoding="utf-8")
    notes = {"names_sha256": sha256_of(listed)}
    return save_random(tmp_path / "model.safetensors", "abcé", notes=notes, end=-0.5), file, listed, drawn


def draw(path: str, n: int, **options) -> list[str]:
    checkpoint = load_checkpoint(path)
    return list(sample_stream(checkpoint.model, checkpoint.vocab, n, device="cpu", **options))


def texts(data: bytes) -> list[str]:
    return data.decode().split("\n")[:-1]


LONG = {"temperature": 0, "prefix": "abcabcabcabc"}  # longer than the context


@pytest.mark.parametrize(
    "options", [{"seed": 7, "temperature": 0.5, "top_k": 3}, {"top_p": 0.4, "max_length": 3}, LONG], ids=str
)
def test_names_are_those_of_the_library(sample, model, options):
    options = {"max_length": 20} | options
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    expected = draw(model, 30, **options)
    for batch_size in ([], ["--batch-size", 7]):
        code, out, err = sample("--count", 30, *arguments, *batch_size)
        assert (code, texts(out), err) == (0, expected, "")
    assert texts(sample("--count", 7, *arguments)[1]) == expected[:7]


@pytest.mark.parametrize(("characters", "dtype"), [("abcé", torch.float32), (ODD, torch.float64)])
def test_likelihoods_have_the_scorers_bits(sample, save_random, tmp_path, characters, dtype):
    """At temperature 1 whatever the names were drawn at, and also for names that were cut."""
    path = save_random(tmp_path / "model.safetensors", characters, end=-0.5, dtype=dtype)
    arguments = ["--count", 50, "--temperature", 3, "--max-length", 4]
    names = texts(sample(*arguments, model=path)[1])
    assert {len(name) for name in names} >= {3, 4} and set("".join(names)) == set(characters)
    scorer = Scorer.load(path, device="cpu")
    code, out, _ = sample(*arguments, "--format", "tsv", model=path)
    header, *rows = [text.split("\t") for text in texts(out)]
    assert code == 0 and header == COLUMNS and [json.loads(f'"{name}"') for name, _, _ in rows] == names
    for place, values in ((1, scorer.score(names)), (2, scorer.bits_per_character(names))):
        assert torch.equal(torch.tensor([float(row[place]) for row in rows], dtype=dtype), values)
    code, out, _ = sample(*arguments, "--format", "jsonl", model=path)
    numbers = [(float(score), float(bits)) for _, score, bits in rows]
    expected = [dict(zip(COLUMNS, (name, *both))) for name, both in zip(names, numbers)]
    assert code == 0 and [json.loads(text) for text in texts(out)] == expected


def test_novel_and_unique_names(sample, trained):
    path, file, listed, drawn = trained
    novel, unique = [name for name in drawn if name not in listed], list(dict.fromkeys(drawn))
    both = list(dict.fromkeys(novel))
    assert 10 < len(both) < min(len(novel), len(unique)) < len(drawn)
    skip_listed = ["--novel", "--list", file]
    for options, expected in ((skip_listed, novel), (["--unique"], unique), ([*skip_listed, "--unique"], both)):
        code, out, err = sample("--count", len(expected), *options, model=path)
        assert (code, texts(out), err) == (0, expected, "")


def test_a_model_with_a_notebooks_numbers_and_its_list(sample, save_random, tmp_path):
    """`.` is a character there; `save_checkpoint` says of which list the model is."""
    vocab = Vocabulary.from_mapping({"é": 0, "<E>": 2, ".": 1, "b": 3, "a": 4}, end="<E>")
    drawn = draw(save_random(tmp_path / "model.safetensors", vocab, end=-0.5), 200)
    listed, file = [name for name in drawn[::2] if name], tmp_path / "list.txt"
    path = save_random(tmp_path / "model.safetensors", vocab, end=-0.5, names=listed)
    assert set("".join(drawn)) == set("é.ba") and any("." in name for name in listed)
    assert texts(sample("--count", 200, model=path)[1]) == drawn
    file.write_text("\n".join(listed), encoding="utf-8")
    code, out, err = sample("--count", 20, "--novel", "--list", file, "--format", "tsv", model=path)
    _, *rows = [text.split("\t") for text in texts(out)]
    names = [name for name in drawn if name not in listed][:20]
    assert (code, err) == (0, "") and [name for name, *_ in rows] == names
    assert torch.equal(torch.tensor([float(row[1]) for row in rows]), Scorer.load(path, device="cpu").score(names))


@pytest.mark.parametrize("line_end", ["\n", "\r"])
def test_names_with_line_ends_are_written_in_formats_that_have_escapes(sample, save_random, tmp_path, line_end):
    path = save_random(tmp_path / "model.safetensors", "a" + line_end, end=-0.5)
    code, out, err = sample(model=path)
    found = f"--format txt: --model {path} has the character {line_end!r}, which ends a line inside a name"
    fix = "use --format tsv or --format jsonl, which write it as an escape"
    assert (code, out, err) == (2, b"", f"wavenet-conv: {found}; {fix}\n")
    code, out, err = sample("--format", "jsonl", model=path)
    names = [json.loads(text)["name"] for text in texts(out)]
    assert (code, err, names) == (0, "", draw(path, 20)) and line_end in "".join(names)
    _, *rows = texts(sample("--format", "tsv", model=path)[1])
    assert [json.loads(f'"{row.split(chr(9))[0]}"') for row in rows] == names


def test_training_lists_that_are_missing_or_wrong_are_rejected(sample, monkeypatch, tmp_path, trained):
    path, file, listed, drawn = trained
    monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(file))  # as if it were the lecture's, which may not be here
    monkeypatch.setattr(names_module, "LECTURE_SHA256", sha256_of(listed))
    assert texts(sample("--novel", model=path)[1]) == [name for name in drawn if name not in listed][:20]
    other = tmp_path / "other.txt"
    other.write_text("emma\nava\n")
    monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(other))
    trained_on = f"--novel: --model {path} was trained on a list with SHA-256 {sha256_of(listed)}, which is not "
    fix = "; give it with --list FILE, or run wavenet-conv lecture-names once"
    for arguments, message in (
        ([], f"{trained_on}on this machine{fix}"),
        (["--list", other], f"{trained_on}{other}{fix}"),
        (["--list", "missing"], "--list missing: No such file or directory; give a text file with one name per line"),
    ):
        assert sample("--novel", *arguments, model=path) == (2, b"", f"wavenet-conv: {message}\n")
    code, out, err = sample("--novel", "--list", file)
    assert (code, out) == (2, b"") and "write it with save_checkpoint(path, model, vocab, names=training_names)" in err


def test_the_job_fails_when_there_are_no_more_new_names(sample, monkeypatch):
    """Exactly after `GIVE_UP_DRAWS` draws without one; what has been written stays."""
    some = ["a", *["a"] * 49, "b", *["a", "b"] * 25, "c"]
    monkeypatch.setattr(command, "GIVE_UP_DRAWS", 50)
    monkeypatch.setattr(sampling, "sample_stream", lambda *_, **__: iter(some))
    code, out, err = sample("--count", 3, "--unique")
    assert (code, out) == (1, b"a\nb\n")
    assert err.startswith("wavenet-conv: no new name in 50 draws, after 2 of 3; ask for fewer with --count, ")
    some[-2:] = ["c"]
    assert sample("--count", 3, "--unique") == (0, b"a\nb\nc\n", "")


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt("interrupted"), 130), (SamplingError("the logits are NaN"), 1)]
)
def test_names_are_written_as_they_are_drawn(sample, monkeypatch, error, code):
    """One by one if the model is slow, and before any other is drawn; they stay if the job then fails."""
    drawn, written, write = [], [], command.write_output

    def stream(*_, **__):
        for name in map(str, range(30)):
            drawn.append(name)
            yield name
        raise error

    monkeypatch.setattr(command, "CHUNK_SECONDS", 0)
    monkeypatch.setattr(sampling, "sample_stream", stream)
    monkeypatch.setattr(command, "write_output", lambda data: written.append((data, len(drawn))) or write(data))
    assert sample("--count", 20) == (0, b"".join(data for data, _ in written), "") and len(drawn) == 20
    assert [row for row in written if row[0]] == [(b"%d\n" % number, number + 1) for number in range(20)]
    found, out, err = sample("--count", 31)
    assert (found, texts(out), err) == (code, drawn[20:], f"wavenet-conv: {error}\n")
