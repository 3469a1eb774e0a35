"""A web page in which one slides the tree oneself: one HTML file with the model inside, which needs no network.

`page.html` is what one sees, `page.css` how it looks, `model.js` the arithmetic, and `view.js` draws it.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.weights import Affine, LayerWeights, NormWeights, fold
from ..errors import ConfigError, NamesError
from ..model import ConvWaveNet, check_pair
from ..vocabulary import Vocabulary

MAX_BYTES = 20_000_000  # of weights in float32; a browser reads a larger file, but slowly
MAX_CONTEXT = 1024  # tokens; the page draws every one of them
MAX_NAME = 300  # characters; the page draws their nodes too

_FOLDER = Path(__file__).parent


def page_html(model: ConvWaveNet, vocab: Vocabulary, name: str = "emma", quantiles: Tensor | None = None) -> str:
    """The page of a model, as the text of one HTML file.

    The page computes in float64 with the weights in float32. For models in float32 and float64 its log-probabilities
    equal those of `Scorer` to 1e-5. For a model in half precision `Scorer` itself computes in half precision.

    Args:
        model: A `ConvWaveNet` of any kind, in any mode; batch norm is folded.
        vocab: The vocabulary of the model.
        name: The name that the page shows first. Its field leaves out line ends, which the diagram shows.
        quantiles: As in `Scorer`: float32 `(q,)`, ascending bits per character, from which the page reads percentiles.

    Raises:
        ConfigError: The vocabulary is not the model's or has half of a UTF-16 pair, the weights take more than 20 MB
            or are not finite, or the context is longer than 1,024 tokens.
        NamesError: A character of the name is not in the vocabulary, or the name has more than 300 characters.
    """
    check_pair(model, vocab)
    _check_limits(model, vocab)
    if len(name) > MAX_NAME:
        raise NamesError(f"the name has {len(name)} characters; a page shows at most {MAX_NAME}; give a shorter one")
    vocab.encode([name], context=1)  # raises for an unknown character
    parts = {"data": _data(model, vocab, name, quantiles), "longest": str(MAX_NAME)}
    # One pass over the template, so that nothing is replaced inside a part. A function, since parts have backslashes.
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts.get(match[1]) or _read(match[1]), _read("page.html"))


def _check_limits(model: ConvWaveNet, vocab: Vocabulary) -> None:
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > MAX_BYTES:
        limit = f"a page holds at most {MAX_BYTES / 1e6:.0f} MB"
        raise ConfigError(f"its weights take {size / 1e6:,.1f} MB; {limit}; give a smaller model")
    if model.context > MAX_CONTEXT:
        limit = f"a page draws at most {MAX_CONTEXT:,}"
        raise ConfigError(f"its context is {model.context:,} tokens; {limit}; give a model with a shorter context")
    half = re.search("[\ud800-\udfff]", vocab.characters)
    if half:
        reason = "half of a UTF-16 pair, which JavaScript joins with the other half"
        raise ConfigError(f"its vocabulary has {half[0]!a}, {reason}; give a model without it")


def _read(file: str) -> str:
    return (_FOLDER / file).read_text("utf-8")


def _data(model: ConvWaveNet, vocab: Vocabulary, name: str, quantiles: Tensor | None) -> str:
    """The model as JSON in ASCII without `<`, so that no text in it ends the `script` element that holds it."""
    weights = fold(model, "cpu", torch.float64)
    layers = list(weights.layers)
    if len(layers) == len(model.layers):  # otherwise the head is the last of them
        layers.append(LayerWeights(weights.head.weight[None], weights.head.bias, model.context, "none"))
    places = [*(f"layer {number}" for number in range(1, len(layers))), "head"]
    data: dict[str, Any] = {
        "name": name,
        "characters": vocab.characters,
        "end": vocab.end,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "quantiles": None if quantiles is None else _tensor(quantiles, "list of quantiles"),
        "embedding": _tensor(weights.embedding, "embedding"),
        "layers": [_layer(layer, place) for layer, place in zip(layers, places)],
    }
    if weights.hidden is not None:
        data["layers"][-1]["hidden"] = _affine(weights.hidden, "head")
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _layer(layer: LayerWeights, place: str) -> dict[str, Any]:
    found = {"kernelSize": len(layer.taps), "dilation": layer.dilation, "activation": layer.activation}
    found |= _affine(Affine(layer.taps.flatten(0, 1), layer.bias), place)  # the lecture's matrix: ((j c), o)
    if layer.norm is not None:
        found["norm"] = _affine(layer.norm, place) | {"eps": layer.norm.eps}
    for key, pair in (("residual", layer.residual), ("skip", layer.skip)):
        if pair is not None:
            found[key] = _affine(pair, place)
    return found


def _affine(pair: Affine | NormWeights, place: str) -> dict[str, Any]:
    return {"weight": _tensor(pair.weight, place), "bias": _tensor(pair.bias, place)}


def _tensor(tensor: Tensor, place: str) -> dict[str, str]:
    """A tensor, flattened in rows, as `decode` in model.js reads it."""
    numbers = tensor.float()
    if not numbers.isfinite().all():
        raise ConfigError(
            f"its {place} has a NaN or an infinite number in float32; train it again, or give another model"
        )
    return {"float32": b64encode(numbers.numpy().astype("<f4").tobytes()).decode()}
