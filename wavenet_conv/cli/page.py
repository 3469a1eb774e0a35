"""`wavenet-conv page`: a model as a web page, in which one slides the tree oneself."""

from __future__ import annotations

import os
from typing import Any

from ..errors import ConfigError, NamesError
from .options import add_command, check_output, load_model, output_errors, usage_errors
from .rows import write_output

DESCRIPTION = """\
Writes one HTML file with the model inside. Open it in a browser: it needs no network and no server. The page draws
every node that the model computes for a name, slides the tree over them, and counts what a loop, a convolutional pass
and a stream compute. An existing file is replaced when the new one is complete.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv page`."""
    command = add_command(commands, page, "write a web page that shows a model at work", DESCRIPTION)
    add = command.add_argument
    help = "a checkpoint; 'default' is the one in the package"
    add("--model", default="default", metavar="PATH", help=help)
    add("--name", default="emma", metavar="TEXT", help="the name that the page shows first (emma)")
    add("-o", "--output", default="page.html", metavar="FILE", help="the file to write (page.html)")


def page(*, model: str, name: str, output: str) -> None:
    """Run the command; the arguments are its options."""
    from ..checkpoint import DEFAULT
    from ..files import write_whole
    from ..page import page_html

    check_output(output, str(DEFAULT) if model == "default" else model)
    checkpoint = load_model(model)
    with usage_errors(ConfigError, f"--model {model}: "), usage_errors(NamesError, "--name: "):
        html = page_html(checkpoint.model, checkpoint.vocab, name, checkpoint.quantiles).encode()
    with output_errors(output, "the file is as it was before"):
        write_whole(os.path.realpath(output), html)
    write_output(os.fsencode(f"{output}: {len(html) / 1e6:.2f} MB; open it in a browser\n"))
