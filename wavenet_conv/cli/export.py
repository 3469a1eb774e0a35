"""`wavenet-conv export`: a model as an ONNX file, for other runtimes and languages."""

from __future__ import annotations

import os
from typing import Any

from ..errors import ConfigError
from .options import add_command, check_output, load_model, output_errors, usage_errors
from .rows import write_output

DESCRIPTION = """\
Writes a model as an ONNX file, which onnxruntime and others run without PyTorch: int64 tokens (batch, time) in,
log-probabilities (batch, time - context + 1, vocab) out, in nats. The file's metadata have the characters in the order
of their tokens, the end token and the context, each as JSON. FILE is replaced when onnxruntime has given the model's
log-probabilities. Needs the extra onnx.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv export`."""
    command = add_command(commands, export, "write a model as an ONNX file", DESCRIPTION)
    help = "a checkpoint; 'default' is the one in the package"
    command.add_argument("--model", default="default", metavar="PATH", help=help)
    command.add_argument("--onnx", required=True, metavar="FILE", help="the file to write")


def export(*, model: str, onnx: str) -> None:
    """Run the command; the arguments are its options."""
    from ..checkpoint import DEFAULT
    from ..onnx import export_onnx

    check_output(onnx, str(DEFAULT) if model == "default" else model, option="--onnx")
    checkpoint = load_model(model)
    with output_errors(onnx, "the file is as it was before"), usage_errors(ConfigError):
        export_onnx(checkpoint.model, os.path.realpath(onnx), checkpoint.vocab)
    write_output(os.fsencode(f"{onnx}: tokens in, log-probabilities out; context {checkpoint.model.context}\n"))
