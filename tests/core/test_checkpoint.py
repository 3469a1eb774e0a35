"""A checkpoint comes back bit for bit, or is rejected with the reason; a failed write harms nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from hashlib import sha256
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from helpers import ALPHABET, numberings, random_tree
from hypothesis import given

from wavenet_conv import ConvWaveNet, Scorer, Vocabulary, WaveNetConfig
from wavenet_conv.checkpoint import load_checkpoint, save_checkpoint
from wavenet_conv.errors import CheckpointError
from wavenet_conv.metadata import norms_of

AB = Vocabulary("ab")
SMALL = WaveNetConfig(vocab_size=3, n_embd=2, n_hidden=3, kernel_sizes=(2, 2))
GATED = WaveNetConfig(vocab_size=3, n_embd=2, n_hidden=3, kernel_sizes=(2, 2), gated=True)
NAMES = ["ab", "a", "", "bbb", "ab"]
MIXED = {"n_hidden": (5, 1, 4), "kernel_sizes": (3, 1, 2)}
LATER = {"norm": ("layer", "none", "batch"), "activation": ("gelu", "none", "tanh"), "head_kernel_size": 2}
THIRD = WaveNetConfig(3, 2, 3, kernel_sizes=(2, 2), norm=("layer", "none"), head_norm="batch")
SHAPES: list[dict] = [{"bias": True}, {"norm": "none"}, MIXED, MIXED | {"gated": True}, MIXED | LATER]
SHAPES += [{"head_norm": "layer"}, LATER | {"head_norm": "batch", "bias": False}, {"activation": "relu"}]


def small(config=SMALL, dtype=torch.float32, value=1.0) -> ConvWaveNet:
    """A model in which no tensor has its initial value."""
    model, generator = ConvWaveNet(config, dtype=dtype), torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    model.head.bias.data[0] = value
    return model


def parts(path: Path) -> tuple[dict, dict]:
    """The tensors and the metadata of a file."""
    with safetensors.safe_open(path, "pt") as file:
        return safetensors.torch.load_file(path), file.metadata()


def changed(path: Path, *, saved=None, tensors=(), config=(), without=None, **metadata) -> Path:
    """Replaces some tensors, config fields and metadata of a file, and removes the one called `without`."""
    found, about = parts(path)
    fields = json.loads(about["config"]) | dict(config)
    fields.pop(without, None)
    found |= dict(tensors)
    found.pop(without, None)
    path.write_bytes(safetensors.torch.save(found, about | {"config": json.dumps(fields)} | metadata))
    return path


def rejection(path) -> str:
    """The message of `load_checkpoint`, after the name of the file."""
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    assert str(raised.value).startswith(f"{path}: ")
    return str(raised.value).removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path) -> Path:
    save_checkpoint(tmp_path / "model.safetensors", small(), AB, {"list": "none"}, names=NAMES)
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_every_bit_comes_back(tmp_path, sizes, dtype):
    model = small(WaveNetConfig(**{"vocab_size": 3, "n_embd": 2, "n_hidden": 3, **sizes}), dtype)
    for place, norm in enumerate(norms_of(model), start=7):
        vars(norm).update({"eps": 1e-3 / place, "momentum": 0.2 / place})
    model.train()
    save_checkpoint(tmp_path / "m", model, AB)
    loaded = load_checkpoint(tmp_path / "m")
    assert model.training and not any(module.training for module in loaded.model.modules())
    assert loaded.model.config == model.config and loaded.vocab == AB
    assert loaded.notes == {} and loaded.quantiles is None
    for (name, tensor), saved in zip(loaded.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert tensor.dtype == dtype and torch.equal(tensor.view(torch.uint8), saved.view(torch.uint8)), name
    for place, norm in enumerate(norms_of(loaded.model), start=7):
        assert norm.eps == 1e-3 / place and getattr(norm, "momentum", 0.2 / place) == 0.2 / place


FIRST = '{"vocab_size": 3, "n_embd": 2, "n_hidden": [3, 3], "batch_norm": true, "bias": false, "fan_ins": [2, 2], '
FIRST += '"norms": [[1e-05, 0.1], [1e-05, 0.1]]}'
SECOND = '{"vocab_size": 3, "n_embd": 2, "n_hidden": [3, 3], "batch_norm": false, "bias": true, "gated": true, '
SECOND += '"fan_ins": [2, 2], "norms": []}'


@pytest.mark.parametrize(
    ("config", "version", "text"), [(SMALL, "1", FIRST), (GATED, "2", SECOND)], ids=["plain", "gated"]
)
def test_file_has_the_bytes_that_older_releases_write_and_read(path, config, version, text):
    save_checkpoint(path, small(config), AB)
    tensors, metadata = parts(path)
    assert (metadata["version"], metadata["config"]) == (version, text)
    inside = ["conv.weight", "skip.weight"] if config.gated else ["conv.weight", "norm.running_mean"]
    assert {f"levels.{layer}.{name}" for layer in (0, 1) for name in inside} <= set(tensors)
    assert not any(name.startswith("layers") for name in tensors) and "end" not in metadata
    assert load_checkpoint(path).model.config == config


def test_other_kinds_are_version_3(path):
    save_checkpoint(path, small(THIRD), AB)
    tensors, metadata = parts(path)
    fields = json.loads(metadata["config"])
    assert metadata["version"] == "3" and fields["norms"] == [[1e-5], [1e-5, 0.1]] and "batch_norm" not in fields
    assert (fields["norm"], fields["head_norm"], fields["bias"]) == (["layer", "none"], "batch", True)
    assert {"levels.0.norm.weight", "head.weight", "head_norm.running_var"} <= set(tensors)
    for other in SHAPES[4:]:
        save_checkpoint(path, small(WaveNetConfig(3, 2, **({"n_hidden": 3} | other))), AB)
        assert parts(path)[1]["version"] == "3"


def test_notes_quantiles_and_any_vocabulary_come_back(path):
    loaded = load_checkpoint(path)
    bits = Scorer(small(), AB).bits_per_character(NAMES)
    assert loaded.notes == {"list": "none", "names_sha256": sha256(b"\na\nab\nab\nbbb").hexdigest()}
    assert torch.equal(loaded.quantiles[::250], bits.sort().values) and len(loaded.quantiles) == 1001
    assert Scorer.load(path).percentile(NAMES).argsort().tolist() == bits.argsort().tolist()
    save_checkpoint(path, small(), AB, {"names_sha256": "of a longer list"}, names=iter(NAMES))
    assert load_checkpoint(path).notes == {"names_sha256": "of a longer list"}
    vocab = Vocabulary('é"\\\n\0\U0001f600 ')
    save_checkpoint(path, small(WaveNetConfig(vocab_size=len(vocab), n_embd=1, n_hidden=1)), vocab)
    assert load_checkpoint(str(path)).vocab == vocab


@given(numberings(), st.booleans())
def test_a_notebooks_vocabulary_comes_back(tmp_path_factory, numbering, gated):
    """In a file that releases without `from_mapping` reject, unless the vocabulary is standard."""
    vocab, path = numbering[0], tmp_path_factory.getbasetemp() / "model.safetensors"
    config = WaveNetConfig(len(vocab), 2, 3, (2, 2), gated=gated)
    save_checkpoint(path, small(config), vocab)
    standard = repr(vocab) == f"Vocabulary({vocab.characters!r})"
    expected = ("2" if gated else "1", None) if standard else ("3", str(vocab.end))
    assert (parts(path)[1]["version"], parts(path)[1].get("end")) == expected
    loaded = load_checkpoint(path)
    assert loaded.vocab == vocab and repr(loaded.vocab) == repr(vocab) and loaded.model.config == config


def test_default_checkpoint_is_trained_and_draws_no_random_numbers():
    before = torch.get_rng_state()
    checkpoint = load_checkpoint("default")
    assert torch.equal(torch.get_rng_state(), before)
    assert checkpoint.vocab.characters == ALPHABET and checkpoint.model.config == WaveNetConfig()
    tokens, _ = checkpoint.vocab.encode(["emma", "olivia", ""], context=checkpoint.model.context)
    with torch.no_grad():
        log_probs = checkpoint.model(tokens).log_softmax(-1)
    assert -log_probs[:2, :4].gather(2, tokens[:2, 8:12, None]).mean() < 2.5  # guessing costs 3.30 nats
    assert len(checkpoint.quantiles) == 1001
    assert {"names_sha256", "train_loss", "validation_loss", "test_loss"} <= checkpoint.notes.keys()


def test_truncated_file_and_flipped_bit_of_the_header_are_rejected(path):
    save_checkpoint(path, small(WaveNetConfig(3, 1, 1, (2,), norm="none")), AB)
    changed(path, tensors={"quantiles": torch.ones(2)})
    data, rejected = path.read_bytes(), 0
    for wrong in [*(data[:length] for length in range(0, len(data), 3)), data[:-1], data + b"123"]:
        path.write_bytes(wrong)
        assert "the file is damaged; copy it again" in rejection(path)
    for place in range(8 + int.from_bytes(data[:8], "little")):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            load_checkpoint(path)  # some bits mean the same: a space for a tab
        except CheckpointError:
            rejected += 1
    assert rejected > 400


class Trap:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def test_pickle_is_rejected_unread(path):
    path.write_bytes(pickle.dumps([Trap()] * 9))
    assert "a pickle, as torch.save writes them; reading one can run any code" in rejection(path)
    torch.save(small().state_dict(), path)
    assert "a pickle" in rejection(path)


def test_header_whose_length_starts_as_a_pickle_is_read(tmp_path):
    first_bytes = set()
    for spare in range(0, 256, 8):
        save_checkpoint(tmp_path / "m", small(), AB, {"spare": "x" * spare})
        first_bytes.add((tmp_path / "m").read_bytes()[0])
    assert 0x80 in first_bytes  # saving loads each file


def test_other_file_is_rejected(path):
    deep = (100_000).to_bytes(8, "little") + b"[" * 100_000
    for data in (b"emma\nolivia\nava\n", b"\2\0\0\0\0\0\0\0[]", deep):
        path.write_bytes(data)
        assert "not a safetensors file" in rejection(path)
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    assert "another model" in rejection(path)
    assert "No such file" in rejection(path.parent / "none") and "null byte; give a file" in rejection("a\0b")
    assert "give a file that save_checkpoint wrote, or 'default'" in rejection(path.parent)


NAN = torch.tensor([1.0, torch.nan, torch.inf])
MISFITS = [
    ({"format": "pt"}, "another model: its format is not 'wavenet-conv'"),
    ({"version": "4"}, "its version is '4', not one of 1, 2, 3; install a newer"),
    ({"end": "1"}, "its end is '1', which is not a token of a version 3 file; write it again with save_checkpoint"),
    *[({"saved": THIRD, "end": end}, f"its end is '{end}', which") for end in ("3", "-1", "01", "", "one")],
    ({"saved": THIRD, "end": "1", "vocabulary": "aa"}, "the key 'a' has the tokens 0 and 2"),
    ({"saved": THIRD, "end": "1", "vocabulary": "abc"}, "its vocabulary 'abc' is not the 2 characters of the model"),
    ({"saved": THIRD, "vocabulary": "ba"}, "its vocabulary 'ba' is not the 2 characters of the model in order"),
    ({"notes": "{"}, "its notes is not a JSON object"),
    ({"vocabulary": "abc"}, "its vocabulary 'abc' is not the 2 characters of the model"),
    ({"config": {"width": 3}}, "other fields or types than this library's"),
    ({"without": "fan_ins"}, "other fields"),
    ({"config": {"fan_ins": [2, 0]}}, "kernel_sizes[1] is 0"),
    ({"config": {"batch_norm": "no"}}, "types"),
    ({"config": {"norms": [[1e-5, 0.1], [float("nan"), 0.1]]}}, "not eps, and momentum of batch norms, of 2 norms"),
    ({"config": {"n_embd": 10**18}}, "cannot be built"),
    ({"config": {"n_embd": 10**11}}, "'embedding.weight' is (3, 2) in the file and (3, 100000000000) in the model"),
    ({"without": "head.bias"}, "'head.bias' is missing in the file and (3,) in the model"),
    ({"tensors": {"head.scale": torch.ones(1)}}, "'head.scale' is (1,) in the file and missing in the model"),
    ({"tensors": {"levels.0.norm.weight": NAN}}, "layers.0.norm.weight has values that are NaN or infinite"),
    ({"tensors": {"head.bias": torch.ones(3).double()}}, "its weights are of ['torch.float32', 'torch.float64']"),
    ({"tensors": {"quantiles": torch.ones(3).double()}}, "quantiles must be torch.float32"),
    ({"tensors": {"quantiles": torch.tensor([2.0, 1.0])}}, "ascending"),
    ({"saved": THIRD, "config": {"norms": [[1e-5, 0.1], [1e-5, 0.1]]}}, "of batch norms, of 2 norms"),
    ({"saved": THIRD, "config": {"norms": [[float("inf")], [1e-5, 0.1]]}}, "of 2 norms"),
    ({"saved": THIRD, "config": {"norms": [["a"], [1e-5, 0.1]]}}, "of 2 norms"),
    ({"saved": THIRD, "config": {"activation": ["tanh", "tan"]}}, "activation is 'tan'; it must be one of"),
    ({"saved": THIRD, "config": {"norm": None}}, "other fields or types"),
    ({"saved": THIRD, "config": {"gated": 0}}, "other fields or types"),
    ({"saved": THIRD, "config": {"bias": "no"}}, "bias is 'no'; it must be one of None, True, False"),
    ({"saved": THIRD, "config": {"head_kernel_size": 2}}, "'head.weight' is (3, 3, 1) in the file and (3, 3, 2)"),
    ({"saved": THIRD, "version": "1"}, "other fields"),
    ({"version": "3"}, "other fields"),
    ({"saved": GATED, "config": {"gated": False}}, "'layers.0.conv.weight' is (6, 2, 2) in the file and (3, 2, 2)"),
]


@pytest.mark.parametrize(("change", "complaint"), MISFITS, ids=[complaint[:40] for _, complaint in MISFITS])
def test_parts_that_do_not_fit_are_rejected(tmp_path, change, complaint):
    save_checkpoint(tmp_path / "m", small(change.get("saved", SMALL)), AB)
    assert complaint in rejection(changed(tmp_path / "m", **change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"vocab": Vocabulary("abc")}, "its vocabulary 'abc'"),
        ({"vocab": Vocabulary("a\ud800")}, "Unicode text"),
        ({"model": random_tree()}, "holds a ConvWaveNet, not a Sequential"),
        ({"notes": {"loss": torch.ones(1)}}, "notes hold what JSON can"),
        ({"model": small(value=torch.nan)}, "head.bias has values that are NaN or infinite"),
        ({"model": small(value=torch.nan), "names": NAMES}, "head.bias has values that are NaN or infinite"),
        ({"names": []}, "names is empty; give the list that the model was trained on"),
        ({"names": ["ab", "ac"]}, "name 1 ('ac'): character 'c' at position 1 is not in the vocabulary 'ab'"),
        ({"names": "ab"}, "names is one string, 'ab'; pass a list"),
        ({"notes": ["emma"]}, "notes are a list; give a dict, and a training list as names="),
    ],
    ids=["size", "surrogate", "tree", "notes", "nan", "nan of names", "no names", "unknown", "string", "list"],
)
def test_saving_rejects_what_loading_would(path, change, complaint):
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=re.escape(complaint)) as raised:
        save_checkpoint(path, **{"model": small(), "vocab": AB} | change)
    assert str(raised.value).startswith(f"{path}: ")
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_failed_write_leaves_the_previous_file(path, monkeypatch, function, failure):
    def fail(*_):
        raise failure

    before = path.read_bytes()
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(failure)):
        save_checkpoint(path, small(), AB)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_same_model_gives_the_same_bytes(tmp_path):
    """So that a checksum says whether two runs gave the same model."""
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_checkpoint(file, small(), AB, {"b": 1, "a": [2.5, "é"]})
    assert len({file.read_bytes() for file in files}) == 1
