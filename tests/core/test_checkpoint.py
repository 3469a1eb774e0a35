"""A checkpoint comes back bit for bit, or is rejected with the reason; a failed write harms nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import ALPHABET, random_tree, run_python

from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, from_tree
from wavenet_conv.checkpoint import load_checkpoint, save_checkpoint
from wavenet_conv.errors import CheckpointError
from wavenet_conv.files import write_whole

AB = Vocabulary("ab")
SMALL = WaveNetConfig(vocab_size=3, n_embd=2, n_hidden=3, kernel_sizes=(2, 2))
GATED = WaveNetConfig(vocab_size=3, n_embd=2, n_hidden=3, kernel_sizes=(2, 2), gated=True)
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
MIXED = {"n_hidden": (5, 1, 4), "kernel_sizes": (3, 1, 2)}


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


def changed(path: Path, *, saved=None, tensors=None, config=None, without=(), **metadata) -> Path:
    """Replaces some tensors, config fields and metadata of a file, and removes those in `without`."""
    found, about = parts(path)
    fields = json.loads(about["config"]) | (config or {})
    about["config"] = json.dumps({name: value for name, value in fields.items() if name not in without})
    kept = {name: value for name, value in (found | (tensors or {})).items() if name not in without}
    about = {name: value for name, value in (about | metadata).items() if name not in without}
    path.write_bytes(safetensors.torch.save(kept, about))
    return path


def rejection(path) -> str:
    """The message of `load_checkpoint`, after the name of the file."""
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    assert str(raised.value).startswith(f"{path}: ")
    return str(raised.value).removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path) -> Path:
    save_checkpoint(tmp_path / "model.safetensors", small(), AB, {"list": "none"}, torch.tensor([0.5, 1.0, 3.0]))
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize(
    "sizes",
    [{}, {"batch_norm": False}, {"bias": True}, {"batch_norm": False, "bias": False}, MIXED, MIXED | {"gated": True}],
    ids=str,
)
def test_every_bit_comes_back(tmp_path, sizes, dtype):
    model = small(WaveNetConfig(**{"vocab_size": 3, "n_embd": 2, "n_hidden": 3, **sizes}), dtype)
    norms = [layer.norm for layer in model.layers if model.config.batch_norm]
    for norm in norms:
        norm.eps, norm.momentum = 1e-3 / 7, 0.2 / 3
    model.train()
    save_checkpoint(tmp_path / "m", model, AB)
    loaded = load_checkpoint(tmp_path / "m")
    assert model.training and not any(module.training for module in loaded.model.modules())
    assert loaded.model.config == model.config and loaded.vocab == AB
    assert loaded.notes == {} and loaded.quantiles is None
    for (name, tensor), saved in zip(loaded.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert tensor.dtype == dtype and torch.equal(tensor.view(BITS[dtype]), saved.view(BITS[dtype])), name
    for layer in loaded.model.layers if norms else ():
        assert (layer.norm.eps, layer.norm.momentum) == (1e-3 / 7, 0.2 / 3)


@pytest.mark.parametrize(("config", "version"), [(SMALL, "1"), (GATED, "2")], ids=["plain", "gated"])
def test_file_has_the_names_that_older_releases_read(path, config, version):
    save_checkpoint(path, small(config), AB)
    tensors, metadata = parts(path)
    fields = json.loads(metadata["config"])
    assert metadata["version"] == version and fields.get("gated", False) is config.gated
    asked = {"vocab_size", "n_embd", "n_hidden", "fan_ins", "batch_norm", "bias", "norms"}
    assert set(fields) == asked | ({"gated"} if config.gated else set()) and fields["fan_ins"] == [2, 2]
    inside = ["conv.weight", "conv.bias", "skip.weight", "skip.bias"]
    inside = inside if config.gated else ["conv.weight", *(f"norm.{n}" for n in ("weight", "bias", "running_mean"))]
    assert {f"levels.{layer}.{name}" for layer in (0, 1) for name in inside} <= set(tensors)
    assert not any(name.startswith("layers") for name in tensors)
    assert load_checkpoint(path).model.config == config


def test_notes_quantiles_and_any_vocabulary_come_back(path):
    loaded = load_checkpoint(path)
    assert loaded.notes == {"list": "none"}
    assert loaded.quantiles.dtype == torch.float32 and loaded.quantiles.tolist() == [0.5, 1.0, 3.0]
    vocab = Vocabulary('é"\\\n\0\U0001f600 ')
    save_checkpoint(path, small(WaveNetConfig(vocab_size=len(vocab), n_embd=1, n_hidden=1)), vocab)
    assert load_checkpoint(str(path)).vocab == vocab


def test_default_checkpoint_is_trained_and_draws_no_random_numbers():
    before = torch.get_rng_state()
    checkpoint = load_checkpoint("default")
    assert torch.equal(torch.get_rng_state(), before)
    assert checkpoint.vocab.characters == ALPHABET and checkpoint.model.config == WaveNetConfig()
    tokens, _ = checkpoint.vocab.encode(["emma", "olivia", ""], context=checkpoint.model.context)
    with torch.no_grad():
        log_probs = checkpoint.model(tokens).log_softmax(-1)
    assert log_probs.isfinite().all()
    assert -log_probs[:2, :4].gather(2, tokens[:2, 8:12, None]).mean() < 2.5  # guessing costs 3.30 nats
    assert len(checkpoint.quantiles) == 1001
    assert {"list_sha256", "train_loss", "validation_loss", "test_loss"} <= checkpoint.notes.keys()


@pytest.fixture
def tiny(tmp_path) -> Path:
    save_checkpoint(tmp_path / "m", small(WaveNetConfig(3, 1, 1, (2,), batch_norm=False)), AB, quantiles=torch.ones(2))
    return tmp_path / "m"


def test_every_truncation_is_rejected(tiny):
    data = tiny.read_bytes()
    said = set()
    for length in range(len(data)):
        tiny.write_bytes(data[:length])
        said.add(re.sub(r"[\d,]+", "#", rejection(tiny)))
    assert len(said) == 2 and all(message.startswith("truncated: ") for message in said)
    tiny.write_bytes(data + b"123")
    assert "3 bytes follow its last tensor" in rejection(tiny)


def test_flipped_bit_of_the_header_is_rejected_or_harmless(tiny):
    data, said = tiny.read_bytes(), []
    for place in range(8 + int.from_bytes(data[:8], "little")):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        tiny.write_bytes(flipped)
        try:
            load_checkpoint(tiny)  # some bits mean the same: a space for a tab
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) > 400 and all(message.startswith(f"{tiny}: ") for message in said)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


def test_pickle_is_rejected_unread(path):
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps([Trap()] * 9, protocol))
        assert "a pickle" in rejection(path)
    for zipped in (True, False):
        torch.save(small().state_dict(), path, _use_new_zipfile_serialization=zipped)
        assert "a pickle, as torch.save writes them; reading one can run any code" in rejection(path)


def test_header_that_starts_as_a_pickle_is_read(tmp_path):
    """A safetensors file starts with the length of its header, whose first byte may be 0x80."""
    for spare in range(0, 256, 8):
        save_checkpoint(tmp_path / "m", small(), AB, {"spare": "x" * spare})
        if (tmp_path / "m").read_bytes()[0] == 0x80:
            break
    data = (tmp_path / "m").read_bytes()
    assert data[0] == 0x80
    load_checkpoint(tmp_path / "m")
    for length in (1, 2, 8, 9, 100, len(data) - 1):
        (tmp_path / "m").write_bytes(data[:length])
        assert "truncated" in rejection(tmp_path / "m")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "truncated"),
        (b"emma\nolivia\nava\n", "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        (b"\2\0\0\0\0\0\0\0[]", "not a safetensors file"),
        (b"\2\0\0\0\0\0\0\0{}", "another model"),
        (b"\2\0\0\0\0\0\0\0{{", "is not JSON"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "not a safetensors file"),
    ],
    ids=["empty", "text", "bytes", "array", "object", "braces", "deep"],
)
def test_other_file_is_rejected(path, data, complaint):
    path.write_bytes(data)
    assert complaint in rejection(path)


def test_missing_file_and_folder_are_rejected(tmp_path):
    assert "No such file" in rejection(tmp_path / "none")
    assert "give a file that save_checkpoint wrote, or 'default'" in rejection(tmp_path)


def test_header_that_contradicts_the_tensors_is_rejected(path):
    data = path.read_bytes()
    for old, new in ((b'"F32"', b'"F99"'), (b'"F32"', b'"I64"'), (b"data_offsets", b"data_offsetz"), (b"[3]", b"[4]")):
        path.write_bytes(data.replace(old, new, 1))
        assert "damaged" in rejection(path)


G = {"saved": GATED}
MISFITS = [
    ({"format": "pt"}, "of another model: its format is 'pt'"),
    ({"version": "3"}, "its version is '3' and this library reads '1' and '2'; install a newer"),
    ({"without": ("config",)}, "there is no config"),
    ({"notes": "{"}, "its notes is not JSON"),
    ({"notes": "[]"}, "its notes is not a JSON object"),
    ({"vocabulary": "abc"}, "a vocabulary of 4 tokens ('.' and 3 characters) for a model of 3"),
    ({"vocabulary": "ba"}, "not sorted"),
    ({"config": {"width": 3}}, "other fields than this library's: vocab_size, n_embd"),
    ({"config": {"kernel_sizes": [2, 2]}}, "other fields"),
    ({"without": ("fan_ins",)}, "other fields"),
    ({"config": {"fan_ins": [2, 0]}}, "kernel_sizes[1] is 0"),
    ({"config": {"batch_norm": "no"}}, "batch_norm in its config is 'no', not true or false"),
    ({"config": {"gated": True, "batch_norm": False, "bias": True, "norms": []}}, "conv.weight is of shape"),
    ({"config": {"norms": [[1e-5, 0.1], [float("nan"), 0.1]]}}, "eps and a momentum for each of 2 layers"),
    ({"config": {"n_embd": 10**18}}, "cannot be built"),
    ({"config": {"n_embd": 10**11}}, "embedding.weight is of shape (3, 2) and its config asks for (3, 100000000000)"),
    ({"config": {"bias": True}}, "there is no tensor layers.0.conv.bias"),
    ({"without": ("head.bias",)}, "there is no tensor head.bias"),
    ({"tensors": {"head.scale": torch.ones(1)}}, "a tensor 'head.scale', which its config has no place for"),
    ({"tensors": {"levels.1.conv.weight": torch.ones(3, 3, 4)}}, "layers.1.conv.weight is of shape (3, 3, 4) and its"),
    ({"tensors": {"levels.0.norm.weight": torch.tensor([1.0, torch.nan, torch.inf])}}, "layers.0.norm.weight has 2"),
    ({"tensors": {"head.bias": torch.tensor([1.0, -torch.inf, 0.0])}}, "head.bias has 1 values that are NaN or inf"),
    ({"tensors": {"head.bias": torch.ones(3).double()}}, "its weights are of torch.float32, torch.float64"),
    ({"tensors": {"quantiles": torch.ones(3).double()}}, "quantiles are torch.float64"),
    ({"tensors": {"quantiles": torch.tensor([2.0, 1.0])}}, "ascending"),
    ({"tensors": {"quantiles": torch.tensor([1.0, torch.inf])}}, "finite"),
    (G | {"without": ("levels.0.residual.bias",)}, "there is no tensor layers.0.residual.bias"),
    (G | {"tensors": {"levels.1.residual.bias": torch.ones(2)}}, "'layers.1.residual.bias', which its config has no"),
    (G | {"config": {"n_hidden": [3, 4]}}, "layers.1.conv.weight is of shape (6, 2, 2) and its config asks for (8"),
    (G | {"config": {"gated": False}}, "layers.0.conv.weight is of shape (6, 2, 2) and its config asks for (3, 2, 2)"),
    (G | {"tensors": {"hidden.bias": torch.tensor([1.0, torch.nan])}}, "hidden.bias has 1 values that are NaN"),
]


@pytest.mark.parametrize(("change", "complaint"), MISFITS, ids=[complaint[:40] for _, complaint in MISFITS])
def test_parts_that_do_not_fit_are_rejected(tmp_path, change, complaint):
    save_checkpoint(tmp_path / "m", small(change.get("saved", SMALL)), AB)
    assert complaint in rejection(changed(tmp_path / "m", **change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"vocab": Vocabulary("abc")}, "a vocabulary of 4 tokens"),
        ({"vocab": Vocabulary("a\ud800")}, "Unicode text"),
        ({"vocab": "ab"}, "holds a Vocabulary, not a str"),
        ({"model": random_tree()}, "holds a ConvWaveNet, not a Sequential"),
        ({"notes": {"loss": torch.ones(1)}}, "notes hold what JSON can"),
        ({"quantiles": torch.tensor([2.0, 1.0])}, "ascending"),
        ({"model": small(value=torch.nan)}, "head.bias has 1 values that are NaN or infinite"),
        ({"model": small(value=-torch.inf)}, "head.bias has 1 values that are NaN or infinite"),
    ],
    ids=["size", "surrogate", "string", "tree", "notes", "quantiles", "nan", "inf"],
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


def test_full_disk_leaves_the_previous_file_and_a_missing_folder_is_an_os_error(tmp_path):
    """A limit on the size of files stands for a full disk: the write breaks off in the middle."""
    pytest.importorskip("resource", reason="limits the size of files; run on Linux or macOS")
    (tmp_path / "file").write_bytes(b"before")
    program = (
        "import resource, signal; from wavenet_conv.files import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_whole(sys.argv[1], bytes(5000))\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    assert run_python(program, tmp_path / "file").stdout == "OSError\n"
    assert (tmp_path / "file").read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError, match="No such file"):
        save_checkpoint(tmp_path / "none" / "m", small(), AB)


def test_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    write_whole(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_same_model_gives_the_same_bytes(tmp_path):
    """So that a checksum says whether two runs gave the same model."""
    conv, notes = from_tree(random_tree(n_embd=4, n_hidden=8, dtype=torch.float32)), {"b": 1, "a": [2.5, "é"]}
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_checkpoint(file, conv, Vocabulary(ALPHABET), notes)
    assert len({file.read_bytes() for file in files}) == 1
