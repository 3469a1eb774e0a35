"""Writes a model as an ONNX file, for runtimes without PyTorch. onnxruntime compares it with the model first."""

from __future__ import annotations

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .engine.weights import Affine, LayerWeights, Weights, fold
from .errors import ConfigError, MappingError
from .files import write_whole
from .model import ConvWaveNet, check_pair
from .vocabulary import Vocabulary

OPSET = 20  # the first with Gelu; onnxruntime 1.17 reads it
OPERATORS = {"tanh": "Tanh", "relu": "Relu", "gelu": "Gelu", "sigmoid": "Sigmoid"}
TOLERANCE = 1e-5


def export_onnx(model: ConvWaveNet, path: str | Path, vocab: Vocabulary) -> None:
    """Writes an ONNX file that computes a model's log-probabilities in float32.

    The input is `tokens`, int64 `(batch, time)`, as `Vocabulary.encode` returns them. The output is `log_probs`,
    float32 `(batch, time - context + 1, vocab)`, in nats. Batch is at least 1, and time at least the context.

    The file's metadata say, each as JSON, how to encode a name: `characters` lists the character of each token, `end`
    is the token that pads before a name and ends it ("" in `characters`), and `context` is the number of them before a
    name.

    Before the file is written, onnxruntime must give the model's log-probabilities to 1e-5, or to 1e-5 times the
    largest logit where that is above 1. Needs the extra `onnx`.

    Args:
        model: A `ConvWaveNet` of any kind and dtype, in any mode. Batch norm is folded, and float64 is rounded.
        path: The file to write; an existing one is replaced.
        vocab: The vocabulary of the model.

    Raises:
        ConfigError: The vocabulary is not the model's, or onnx or onnxruntime is not installed.
        MappingError: onnxruntime gives other numbers. `path` is left as it was.
    """
    check_pair(model, vocab)
    onnx = _imported("onnx")
    proto = _Graph(onnx, fold(model, "cpu", torch.float32)).proto()
    characters = [*vocab.characters[: vocab.end], "", *vocab.characters[vocab.end :]]
    metadata = {"characters": characters, "end": vocab.end, "context": model.context}
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in metadata.items()})
    data = proto.SerializeToString()
    _check(model, data)
    write_whole(path, data)


class _Graph:
    """Adds operators to a graph. A value is known by its name; values are `(batch, channels, time)`."""

    def __init__(self, onnx: Any, weights: Weights):
        self.onnx, self.weights = onnx, weights
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def proto(self) -> Any:
        """The whole model, an `onnx.ModelProto`."""
        weights, helper, kinds = self.weights, self.onnx.helper, self.onnx.TensorProto
        embedded = self.add("Gather", self.constant(weights.embedding), "tokens")
        x = self.add("Transpose", embedded, perm=[0, 2, 1])
        if weights.hidden is not None:
            x = self.add("Relu", self.affine(weights.hidden, self.add("Relu", self.skip_sums(x))))
        else:
            for layer in weights.layers:
                x = self.layer(layer, x)
        logits = self.add("Transpose", self.affine(weights.head, x), perm=[0, 2, 1])
        self.nodes.append(helper.make_node("LogSoftmax", [logits], ["log_probs"], axis=-1))
        shape = ["batch", f"time - {weights.config.context - 1}", weights.config.vocab_size]
        ends = [("tokens", kinds.INT64, ["batch", "time"]), ("log_probs", kinds.FLOAT, shape)]
        tokens, log_probs = (helper.make_tensor_value_info(*end) for end in ends)
        graph = helper.make_graph(self.nodes, "wavenet_conv", [tokens], [log_probs], self.constants)
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model_gen_version(graph, opset_imports=[opset], producer_name="wavenet-conv")

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The result of an operator, or its results."""
        names = [f"{operator}_{len(self.nodes)}_{output}" for output in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, tensor: Tensor) -> str:
        """A tensor that is stored in the file."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(tensor.contiguous().numpy(), name))
        return name

    def affine(self, pair: Affine, x: str) -> str:
        """The same linear map of every node."""
        return self.add("Conv", x, self.constant(pair.weight.t()[:, :, None]), self.constant(pair.bias))

    def taps(self, layer: LayerWeights, x: str) -> str:
        """A layer's linear map."""
        weight = self.constant(layer.taps.permute(2, 1, 0))
        return self.add("Conv", x, weight, self.constant(layer.bias), dilations=[layer.dilation])

    def layer(self, layer: LayerWeights, x: str) -> str:
        """A layer without a gate."""
        x = self.taps(layer, x)
        if layer.norm is not None:
            scale, shift = self.constant(layer.norm.weight), self.constant(layer.norm.bias)
            x = self.add("Transpose", x, perm=[0, 2, 1])
            x = self.add("LayerNormalization", x, scale, shift, epsilon=layer.norm.eps)
            x = self.add("Transpose", x, perm=[0, 2, 1])
        if layer.activation == "silu":
            return self.add("Mul", x, self.add("Sigmoid", x))
        return x if layer.activation == "none" else self.add(OPERATORS[layer.activation], x)

    def skip_sums(self, x: str) -> str:
        """What the head of a gated model reads (`model.GatedLayer`)."""
        s = ""
        for layer in self.weights.layers:
            f, g = self.add("Split", self.taps(layer, x), outputs=2, axis=1, num_outputs=2)
            z = self.add("Mul", self.add("Tanh", f), self.add("Sigmoid", g))
            if layer.skip is not None:
                skip = self.affine(layer.skip, z)
                s = self.add("Add", skip, self.rightmost(layer, s)) if s else skip
            if layer.residual is not None:
                x = self.add("Add", self.affine(layer.residual, z), self.rightmost(layer, x))
        return s

    def rightmost(self, layer: LayerWeights, x: str) -> str:
        """The rightmost child of each node of a layer."""
        bounds = ((len(layer.taps) - 1) * layer.dilation, torch.iinfo(torch.int64).max, 2)  # start, end, axis
        return self.add("Slice", x, *(self.constant(torch.tensor([bound])) for bound in bounds))


@torch.no_grad()
def _check(model: ConvWaveNet, data: bytes) -> None:
    """Raises `MappingError` unless onnxruntime gives the model's log-probabilities, of one window and of more."""
    runtime = _imported("onnxruntime")
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    exact, generator = copy.deepcopy(model).to("cpu", torch.float64).eval(), torch.Generator().manual_seed(0)
    for batch, time in ((1, 0), (3, 0), (1, 1), (5, model.context), (2, 30)):
        shape = (batch, model.context + time)
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
        logits = exact(tokens)
        found = torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0])
        allowed = TOLERANCE * max(1.0, float(logits.abs().max()))
        difference = float((found - logits.log_softmax(-1)).abs().max())
        if not difference <= allowed:  # also where it is NaN
            raise MappingError(
                f"onnxruntime {runtime.__version__} gives log-probabilities that differ by {difference:.2g} from the "
                f"model's (at most {allowed:.2g} is allowed) for tokens of shape {shape}; no file was written. Check "
                "that the weights are finite in float32, and try another onnxruntime"
            )


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed; run pip install 'wavenet-conv[onnx]'") from error
