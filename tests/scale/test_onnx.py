"""ONNX files give the model's log-probabilities; a model that onnxruntime does not reproduce leaves no file."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
import torch
from engine.cases import ABC, random_conv
from helpers import KINDS, ROOT

from wavenet_conv import Scorer, Vocabulary, load_checkpoint, onnx, save_checkpoint
from wavenet_conv.cli import main
from wavenet_conv.errors import ConfigError, MappingError
from wavenet_conv.names import lecture_names, read_names
from wavenet_conv.onnx import export_onnx

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (3,), (1, 4, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_log_probabilities_of_every_kind_of_model(path, kind, kernel_sizes, dtype):
    conv = random_conv(kernel_sizes, **kind, dtype=dtype)
    export_onnx(conv.train(), path, ABC)
    assert conv.training
    session = onnxruntime.InferenceSession(path)
    for batch, time in ((1, conv.context), (2, conv.context), (7, conv.context + 1), (3, 40)):
        tokens = torch.randint(27, (batch, time), generator=torch.Generator().manual_seed(time))
        (found,) = session.run(["log_probs"], {"tokens": tokens.numpy()})
        expected = conv.eval()(tokens).detach().log_softmax(2)
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.abs(found - expected.numpy()).max() < 1e-5 * max(1, conv(tokens).abs().max())


@pytest.mark.parametrize("mapping", [".abcdefghijklmnopqrstuvwxyz", ["é", "😀", "<E>", *ABC.characters[2:]]], ids=str)
def test_scores_of_a_list_from_the_file_alone(path, names, mapping):
    """Encodes names by the file's metadata, and scores them in batches of equal length."""
    vocab = Vocabulary.from_mapping(list(mapping), end="<E>" if "<E>" in mapping else ".")
    model = load_checkpoint("default").model
    export_onnx(model, path, vocab)
    if "<E>" not in mapping:
        names = read_names(lecture_names() or ROOT / "names.txt")
    else:
        names = [name.translate({97: "é", 98: "😀"}) for name in names[:1000]]
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    characters, end, context = (json.loads(metadata[key]) for key in ("characters", "end", "context"))
    values, offsets = Scorer(model, vocab).position_log_probs(names)
    compared = 0
    for length in sorted({*map(len, names)}):
        rows = [index for index, name in enumerate(names) if len(name) == length]
        targets = np.array([[*map(characters.index, names[row]), end] for row in rows])
        tokens = np.concatenate([np.full((len(rows), context), end), targets[:, :-1]], axis=1)
        (log_probs,) = session.run(None, {"tokens": tokens})
        found = np.take_along_axis(log_probs, targets[..., None], 2)[..., 0]
        expected = values[offsets[rows][:, None] + torch.arange(length + 1)]
        assert np.abs(found - expected.numpy()).max() < 1e-5
        compared += found.size
    assert compared == len(values)


def test_other_numbers_leave_no_file(path, monkeypatch):
    path.write_text("earlier")
    conv, fold = random_conv(), onnx.fold
    monkeypatch.setattr(onnx, "fold", lambda *args: fold(*args).map(lambda tensor: tensor * 1.0001))
    with pytest.raises(MappingError, match=r"differ by .* from the model's .* no file was written"):
        export_onnx(conv, path, ABC)
    monkeypatch.undo()
    conv.head.bias.data[3] = torch.nan
    with pytest.raises(MappingError, match="differ by nan .* the weights are finite"):
        export_onnx(conv, path, ABC)
    assert path.read_text() == "earlier" and os.listdir(path.parent) == [path.name]


def test_wrong_arguments_are_rejected(path, monkeypatch):
    with pytest.raises(ConfigError, match="the vocabulary has 3 tokens and the model 27"):
        export_onnx(random_conv(), path, Vocabulary("ab"))
    for name in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ConfigError, match=rf"{name} is not installed; .*wavenet-conv\[onnx\]"):
                export_onnx(random_conv(), path, ABC)
    assert not path.exists()


def test_the_command(path, capfd, monkeypatch):
    monkeypatch.chdir(path.parent)
    save_checkpoint("mine", random_conv(gated=True), ABC)
    assert main(["export", "--model", "mine", "--onnx", "model.onnx"]) == 0
    assert capfd.readouterr() == ("model.onnx: tokens in, log-probabilities out; context 8\n", "")  # and no warnings
    assert onnxruntime.InferenceSession(path).get_outputs()[0].shape == ["batch", "time - 7", 27]
    assert main(["export", "--onnx", "no/model.onnx"]) == 2
    assert capfd.readouterr().err.startswith("wavenet-conv: --onnx no/model.onnx: not a regular file")
    assert main(["export", "--model", "mine", "--onnx", "mine"]) == 2
    assert main(["export", "--model", "missing", "--onnx", "model.onnx"]) == 2
    conv = random_conv()
    conv.head.bias.data[0] = 1e300  # infinite in float32
    save_checkpoint("large", conv, ABC)
    assert main(["export", "--model", "large", "--onnx", "new.onnx"]) == 1
    assert sorted(os.listdir()) == ["large", "mine", "model.onnx"]
