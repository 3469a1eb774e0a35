"""`wavenet-conv explain`: names as a model sees them, character by character, and the nodes that they take."""

from __future__ import annotations

import json
from math import log, log2, nan
from typing import TYPE_CHECKING, Any

from .options import add_command, add_model, device_of, load_model, unknown_characters
from .rows import write_output

if TYPE_CHECKING:
    from ..scoring import Scorer

DESCRIPTION = """\
Shows each character of a name, and then its end: its probability, its surprise in bits as a number and as a bar, and
the three likeliest characters there. All bars have one scale. A bar is red above the surprise of a uniform guess,
yellow from half of that on, and green below. Then follow the score, bits per character, and, if the checkpoint has
quantiles of its training list, the percent of that list that need fewer bits. Characters are as in a JSON string.

The last table counts the nodes of each layer. loop: the whole tree of every window. pass: the convolutional pass, one
node at every position. reused: nodes of the loop that the pass takes from an earlier window. stream: one new node per
row. distinct: nodes that cover different characters; `wavenet-conv score` shares equal ones, also across names.

With --json each name is one line. Numbers have all their digits; null is a NaN, or as a character the end.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv explain`."""
    command = add_command(commands, explain, "show what a model expects at each character of a name", DESCRIPTION)
    help = "any string of the model's characters; '' is the empty name; write -- before a name that starts with -"
    command.add_argument("names", nargs="+", metavar="NAME", help=help)
    add_model(command)
    command.add_argument("--json", dest="as_json", action="store_true", help="JSON lines, one object per name")


def explain(names: list[str], *, model: str, device: str, as_json: bool) -> None:
    """Run the command; the arguments are its options."""
    from ..counts import count_nodes
    from ..scoring import Scorer

    checkpoint = load_model(model)
    vocab, config, quantiles = checkpoint.vocab, checkpoint.model.config, checkpoint.quantiles
    scorer = Scorer(checkpoint.model, vocab, device=device_of(device), quantiles=quantiles, remember=True)
    counts = {"nodes_together": count_nodes(names, config)._asdict()}
    records = [{**_scored(name, scorer), "nodes": count_nodes([name], config)._asdict(), **counts} for name in names]
    if as_json:
        finite = (json.loads(json.dumps(r), parse_constant=lambda _: None) for r in records)  # JSON has no NaN
        write_output("".join(f"{json.dumps(record)}\n" for record in finite).encode())
        return
    from .explanation import explanation

    write_output(explanation(records, uniform=log2(len(vocab))))


def _scored(name: str, scorer: Scorer) -> dict[str, Any]:
    """The numbers of a name and of each of its characters."""
    characters, end = scorer.vocab.characters, scorer.vocab.end
    with unknown_characters("NAME", [name], scorer.vocab):
        values = scorer.position_log_probs([name])[0].double()
    falling, order = scorer.logits([name])[0].double().log_softmax(1).sort(dim=1, descending=True, stable=True)
    columns = (values, values.exp(), values / -log(2), falling.exp()[:, :3], order[:, :3])
    of_tokens = [*characters[:end], None, *characters[end:]]
    positions = [
        {
            "character": character,
            "log_probability": value,
            "probability": probability,
            "bits": bits,
            "likeliest": [{"character": of_tokens[t], "probability": p} for p, t in zip(others, tokens)],
        }
        for character, value, probability, bits, others, tokens in zip([*name, None], *(c.tolist() for c in columns))
    ]
    return {
        "name": name,
        "score": scorer.score([name]).item(),
        "bits_per_character": scorer.bits_per_character([name]).item(),
        "percentile": nan if scorer.quantiles is None else scorer.percentile([name]).item(),
        "positions": positions,
    }
