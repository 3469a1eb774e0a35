"""A checkpoint comes back bit for bit, or is refused with a message that says why; a failed write harms nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import random_tree

from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, fold_batch_norm, from_tree
from wavenet_conv.checkpoint import load_checkpoint, save_checkpoint
from wavenet_conv.errors import CheckpointError
from wavenet_conv.files import write_whole

AB = Vocabulary("ab")
SMALL = WaveNetConfig(vocab_size=3, n_embd=2, n_hidden=3, kernel_sizes=(2, 2))
GATED = WaveNetConfig(vocab_size=3, n_embd=2, n_hidden=3, kernel_sizes=(2, 2), gated=True)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def small(config=SMALL, dtype=torch.float32) -> ConvWaveNet:
    """A model in which no tensor is what it is in a new one."""
    model = ConvWaveNet(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def parts(path: Path) -> tuple[dict, dict]:
    """The tensors and the metadata of a file."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def changed(path: Path, *, tensors=None, config=None, without=(), **metadata) -> Path:
    """The file with some tensors, fields of its config and metadata replaced, and those in `without` left out."""
    found, about = parts(path)
    about["config"] = json.dumps(json.loads(about["config"]) | (config or {}))
    kept = {name: value for name, value in (found | (tensors or {})).items() if name not in without}
    about = {name: value for name, value in (about | metadata).items() if name not in without}
    path.write_bytes(safetensors.torch.save(kept, about))
    return path


def refusal(path) -> str:
    """What `load_checkpoint` says; it names the file, and something to do after the complaint."""
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    assert str(raised.value).startswith(f"{path}: ")
    return str(raised.value)


@pytest.fixture
def path(tmp_path) -> Path:
    save_checkpoint(tmp_path / "model.safetensors", small(), AB, {"list": "none"}, torch.tensor([0.5, 1.0, 3.0]))
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch_norm": False},
        {"bias": True},
        {"batch_norm": False, "bias": False},
        {"n_hidden": (5, 1, 4), "kernel_sizes": (3, 1, 2)},
        {"n_hidden": (5, 1, 4), "kernel_sizes": (3, 1, 2), "gated": True},
    ],
    ids=str,
)
def test_every_bit_comes_back(tmp_path, sizes, dtype):
    model = small(WaveNetConfig(**{"vocab_size": 3, "n_embd": 2, "n_hidden": 3, **sizes}), dtype)
    for layer in model.layers:
        if layer.norm is not None:
            layer.norm.eps, layer.norm.momentum = 1e-3 / 7, 0.2 / 3
    model.train()
    save_checkpoint(tmp_path / "m", model, AB)
    loaded = load_checkpoint(tmp_path / "m")
    assert model.training and not any(module.training for module in loaded.model.modules())
    assert loaded.model.config == model.config and loaded.vocab == AB
    assert loaded.notes == {} and loaded.quantiles is None
    there = model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        bits = BITS[tensor.element_size()]
        assert tensor.dtype == dtype and torch.equal(tensor.view(bits), there[name].view(bits)), name
        # A layer reads its weights as the tree's matrix, so the layout matters too; along an axis of 1 there is none.
        layouts = [[step for step, size in zip(t.stride(), t.shape) if size > 1] for t in (tensor, there[name])]
        assert layouts[0] == layouts[1], name
    for layer, other in zip(loaded.model.layers, model.layers):
        assert (layer.norm is None) == (other.norm is None)
        assert layer.norm is None or (layer.norm.eps, layer.norm.momentum) == (other.norm.eps, other.norm.momentum)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_a_mapped_tree_gives_the_same_logits(tmp_path, names, vocab, fold, gated):
    model = from_tree(random_tree(dtype=torch.float32, gated=gated))
    model = fold_batch_norm(model) if fold else model
    save_checkpoint(tmp_path / "m", model, vocab)
    tokens, _ = vocab.encode(names[:50], context=8)
    assert torch.equal(load_checkpoint(tmp_path / "m").model(tokens), model(tokens))


def test_gates_are_told_by_the_config_and_the_version(path):
    """A file without gates is what it always was; a library that reads no others asks for a newer one."""
    metadata = parts(path)[1]
    assert metadata["version"] == "1" and "gated" not in json.loads(metadata["config"])
    assert not load_checkpoint(changed(path, config={"gated": False})).model.config.gated
    save_checkpoint(path, small(GATED), AB)
    metadata = parts(path)[1]
    assert metadata["version"] == "2" and json.loads(metadata["config"])["gated"] is True
    assert load_checkpoint(path).model.config == GATED


def test_notes_and_quantiles_come_back(path):
    loaded = load_checkpoint(path)
    assert loaded.notes == {"list": "none"}
    assert loaded.quantiles.dtype == torch.float32 and loaded.quantiles.tolist() == [0.5, 1.0, 3.0]


def test_a_vocabulary_of_any_characters_comes_back(tmp_path):
    vocab = Vocabulary('é"\\\n\0\U0001f600 ')
    save_checkpoint(tmp_path / "m", small(WaveNetConfig(vocab_size=len(vocab), n_embd=1, n_hidden=1)), vocab)
    assert load_checkpoint(str(tmp_path / "m")).vocab == vocab


def test_loading_draws_no_random_numbers(path):
    before = torch.get_rng_state()
    load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_ships_with_the_package():
    checkpoint = load_checkpoint("default")
    assert checkpoint.vocab.characters == "abcdefghijklmnopqrstuvwxyz"
    assert checkpoint.model.config == WaveNetConfig()
    tokens, lengths = checkpoint.vocab.encode(["emma", "olivia", ""], context=checkpoint.model.context)
    with torch.no_grad():
        log_probs = checkpoint.model(tokens).log_softmax(-1)
    assert log_probs.isfinite().all()
    # A trained model stands well below the 3.30 nats of guessing.
    target = tokens[:2, 8:12]
    assert -log_probs[:2, :4].gather(2, target[..., None]).mean() < 2.5
    assert len(checkpoint.quantiles) == 1001
    assert {"list_sha256", "train_loss", "validation_loss", "test_loss"} <= checkpoint.notes.keys()


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    said = set()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        said.add(re.sub(r"[\d,]+", "#", refusal(path).removeprefix(f"{path}: ")))
    assert len(said) == 2 and all(message.startswith("truncated: ") for message in said)


def test_a_flipped_bit_of_the_header_is_refused_or_read(tmp_path):
    path = tmp_path / "m"
    save_checkpoint(path, small(WaveNetConfig(3, 1, 1, (2,), batch_norm=False)), AB, quantiles=torch.ones(2))
    data = path.read_bytes()
    for place in range(8 + int.from_bytes(data[:8], "little")):
        for bit in (place % 8, (place + 3) % 8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                load_checkpoint(path)  # some bits say the same: a space for a tab
            except CheckpointError as error:
                assert str(error).startswith(f"{path}: ")


def test_what_follows_the_tensors_is_refused(path):
    path.write_bytes(path.read_bytes() + b"123")
    assert "3 bytes follow its last tensor" in refusal(path)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_is_refused_unread(path, protocol):
    path.write_bytes(pickle.dumps([Trap()] * 9, protocol))
    assert "a pickle" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_save_file_is_refused(path, zipped):
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert "a pickle, as torch.save writes them" in refusal(path)


def test_a_header_may_start_as_a_pickle_does(tmp_path):
    """A safetensors file starts with its header's length, and 0x80 is as good a byte there as any other."""
    for spare in range(256):
        save_checkpoint(tmp_path / "m", small(), AB, {"spare": "x" * spare})
        if (tmp_path / "m").read_bytes()[0] == 0x80:
            break
    data = (tmp_path / "m").read_bytes()
    assert data[0] == 0x80
    load_checkpoint(tmp_path / "m")
    for length in (1, 2, 8, 9, 100, len(data) - 1):
        (tmp_path / "m").write_bytes(data[:length])
        assert "truncated" in refusal(tmp_path / "m")


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
def test_other_files_are_refused(path, data, complaint):
    path.write_bytes(data)
    assert complaint in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none")
    assert "directory" in refusal(tmp_path)


def test_a_header_that_lies_about_its_tensors_is_refused(path):
    data = path.read_bytes()
    for old, new in ((b'"F32"', b'"F99"'), (b'"F32"', b'"I64"'), (b"data_offsets", b"data_offsetz"), (b"[3]", b"[4]")):
        path.write_bytes(data.replace(old, new, 1))
        assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "pt"}, "of another model: its format is 'pt'"),
        ({"without": ("format",)}, "of another model: its format is None"),
        ({"version": "3"}, "its version is '3' and this library reads '1' and '2'; install a newer"),
        ({"without": ("config",)}, "there is no config"),
        ({"without": ("vocabulary",)}, "there is no vocabulary"),
        ({"without": ("notes",)}, "there is no notes"),
        ({"notes": "{"}, "its notes is not JSON"),
        ({"notes": "[" * 100_000}, "its notes is not JSON"),
        ({"notes": "[]"}, "its notes is not a JSON object"),
        ({"vocabulary": "abc"}, "a vocabulary of 4 tokens ('.' and 3 characters) for a model of 3"),
        ({"vocabulary": "ba"}, "not sorted"),
        ({"vocabulary": "aa"}, "a character twice"),
        ({"vocabulary": ".a"}, "cannot be one of its characters"),
        ({"vocabulary": ""}, "at least one character"),
        ({"config": {"width": 3}}, "other fields"),
        ({"config": {"kernel_sizes": [2, 0]}}, "kernel_sizes[1] is 0"),
        ({"config": {"kernel_sizes": "22"}}, "kernel_sizes[0] is '2'"),
        ({"config": {"n_hidden": [3]}}, "n_hidden has 1 widths for 2 layers"),
        ({"config": {"batch_norm": "no"}}, "batch_norm in its config is 'no'"),
        ({"config": {"gated": 1}}, "gated in its config is 1, not true or false"),
        ({"config": {"gated": True}}, "batch_norm is True and gated too"),
        ({"config": {"gated": True, "batch_norm": False}}, "bias is False and gated is True"),
        ({"config": {"gated": True, "batch_norm": False, "bias": True, "norms": []}}, "conv.weight is of shape"),
        ({"config": {"batch_norm": False}}, "norms in its config"),
        ({"config": {"norms": [[1e-5, 0.1]]}}, "2 layers with batch norm"),
        ({"config": {"norms": [[1e-5, 0.1], [float("nan"), 0.1]]}}, "norms in its config"),
        ({"config": {"n_embd": 10**18}}, "cannot be built"),
        ({"config": {"n_embd": 10**30}}, "cannot be built"),
        (
            {"config": {"n_embd": 10**11}},
            "embedding.weight is of shape (3, 2) and its config asks for (3, 100000000000)",
        ),
        ({"config": {"bias": True}}, "there is no tensor layers.0.conv.bias"),
        ({"without": ("head.bias",)}, "there is no tensor head.bias"),
        ({"tensors": {"head.scale": torch.ones(1)}}, "a tensor 'head.scale', which its config has no place for"),
        (
            {"tensors": {"layers.1.conv.weight": torch.ones(3, 3, 4)}},
            "layers.1.conv.weight is of shape (3, 3, 4) and its config asks for (3, 3, 2)",
        ),
        (
            {"tensors": {"layers.0.norm.weight": torch.tensor([1.0, torch.nan, torch.inf])}},
            "layers.0.norm.weight has 2",
        ),
        (
            {"tensors": {"head.bias": torch.tensor([1.0, -torch.inf, 0.0])}},
            "head.bias has 1 values that are NaN or inf",
        ),
        ({"tensors": {"head.bias": torch.ones(3).double()}}, "its weights are of torch.float32, torch.float64"),
        ({"tensors": {"head.bias": torch.ones(3).int()}}, "its weights are of torch.float32, torch.int32"),
        ({"tensors": {"quantiles": torch.ones(3).double()}}, "quantiles are torch.float64"),
        ({"tensors": {"quantiles": torch.ones(0)}}, "quantiles are torch.float32 of shape (0,)"),
        ({"tensors": {"quantiles": torch.tensor([2.0, 1.0])}}, "ascending"),
        ({"tensors": {"quantiles": torch.tensor([1.0, torch.inf])}}, "finite"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(path, change, complaint):
    assert complaint in refusal(changed(path, **change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"without": ("layers.0.residual.bias",)}, "there is no tensor layers.0.residual.bias"),
        ({"tensors": {"layers.1.residual.bias": torch.ones(2)}}, "'layers.1.residual.bias', which its config has no"),
        (
            {"tensors": {"layers.1.skip.weight": torch.ones(3, 2, 1)}},
            "layers.1.skip.weight is of shape (3, 2, 1) and its config asks for (2, 3, 1)",
        ),
        (
            {"config": {"n_hidden": [3, 4]}},
            "layers.1.conv.weight is of shape (6, 2, 2) and its config asks for (8, 2, 2)",
        ),
        ({"config": {"gated": False}}, "layers.0.conv.weight is of shape (6, 2, 2) and its config asks for (3, 2, 2)"),
        ({"tensors": {"hidden.bias": torch.tensor([1.0, torch.nan])}}, "hidden.bias has 1 values that are NaN"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, str) else "",
)
def test_what_does_not_fit_a_gated_model_is_refused(path, change, complaint):
    save_checkpoint(path, small(GATED), AB)
    assert complaint in refusal(changed(path, **change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"vocab": Vocabulary("abc")}, "a vocabulary of 4 tokens"),
        ({"vocab": Vocabulary("a\ud800")}, "Unicode text"),
        ({"vocab": "ab"}, "holds a Vocabulary, not a str"),
        ({"model": random_tree()}, "holds a ConvWaveNet, not a Sequential"),
        ({"notes": {"loss": torch.ones(1)}}, "notes hold what JSON can"),
        ({"quantiles": torch.tensor([2.0, 1.0])}, "ascending"),
    ],
    ids=["size", "surrogate", "string", "tree", "notes", "quantiles"],
)
def test_saving_refuses_what_loading_would(path, change, complaint):
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=re.escape(complaint)) as raised:
        save_checkpoint(path, **{"model": small(), "vocab": AB} | change)
    assert str(raised.value).startswith(f"{path}: ")
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_not_saved(path, value):
    model, before = small(), path.read_bytes()
    with torch.no_grad():
        model.layers[1].conv.weight[0, 0, 0] = value
    with pytest.raises(CheckpointError, match=r"layers\.1\.conv\.weight has 1 values that are NaN or infinite"):
        save_checkpoint(path, model, AB)
    assert path.read_bytes() == before


@pytest.mark.parametrize("function", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_the_previous_file_whole(path, monkeypatch, function, failure):
    def fail(*_):
        raise failure

    before = path.read_bytes()
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(failure)):
        save_checkpoint(path, small(), AB)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_disk_that_fills_leaves_the_previous_file_whole(tmp_path):
    """The limit on a file's size stands for a full disk: the write breaks off in the middle."""
    pytest.importorskip("resource", reason="limits the size of files; run on Linux or macOS")
    (tmp_path / "file").write_bytes(b"before")
    program = (
        "import resource, signal, sys; from wavenet_conv.files import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_whole(sys.argv[1], bytes(5000))\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == "OSError\n"
    assert (tmp_path / "file").read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        save_checkpoint(tmp_path / "none" / "m", small(), AB)


@pytest.mark.skipif(os.name != "posix", reason="reads permission bits; run on Linux or macOS")
def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    write_whole(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    """So that a checksum tells whether two runs came to the same."""
    conv, notes = from_tree(random_tree(n_embd=4, n_hidden=8, dtype=torch.float32)), {"b": 1, "a": [2.5, "é"]}
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_checkpoint(file, conv, Vocabulary("abcdefghijklmnopqrstuvwxyz"), notes)
    assert len({file.read_bytes() for file in files}) == 1
