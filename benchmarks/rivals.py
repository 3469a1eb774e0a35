"""What somebody could use, made from a list and ready to score: n-grams, networks of `torch.nn`, and ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from benchmarks import networks
from benchmarks.harness import Session
from benchmarks.methods import Models, exact_scores, parameters
from benchmarks.tables import Row
from reference.ngram import KneserNey
from wavenet_conv import ConvWaveNet, Scorer, Vocabulary, WaveNetConfig, fold_batch_norm
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.training import PRESETS, Recipe, fit, new_model, split_names

try:
    import kenlm
except ImportError:
    kenlm = None

ORDER = 6  # of 2 to 8, that with the lowest validation loss
# About as large as the lecture's network, or as the preset "gated".
NETWORKS = {"LSTM": "lstm-76k", "large LSTM": "lstm-230k", "transformer": "transformer-76k"}
BATCHES = (256, 1024, 64)  # names per batch of these
NGRAMS = f"Kneser-Ney {ORDER}, {'Python' if kenlm is None else 'KenLM'}"

Names = Sequence[str]


class Rival(NamedTuple):
    """A method that was made: what the table says of it, and how it scores, from strings to log-likelihoods."""

    facts: Row
    score: Callable[[Names, int], Any]  # a list, in batches of this size
    one: Callable[[str], Any]
    exact: Callable[[Names], Any]  # the slow definition of the scores of a list
    sizes: Sequence[int] = (1,)
    made_with: int = 1  # threads
    threads: Sequence[int] = (1,)  # that score, in turn


def make_rivals(steps: int | None, session: Session) -> dict[str, Rival]:
    """All of them, made from the training part of the session's list; networks take that many steps, or their own."""
    return {
        NGRAMS: count(session),
        **{name: train_network(network, steps, session) for name, network in NETWORKS.items()},
        "ours-fast": train_ours(steps, session),
        "default": load_default(),
    }


def count(session: Session) -> Rival:
    """The n-grams, which KenLM reads where it is installed; else they score in Python."""
    begin = perf_counter()
    model = KneserNey(split_names(session.names)[0], session.vocab.characters, ORDER)
    exact = lambda names: list(map(model.log_prob, names))
    one = model.log_prob
    if kenlm is not None:
        loaded = in_kenlm(model)
        one = lambda name: loaded.score(" ".join(name), bos=True, eos=True) * log(10)
    facts: Row = {"parameters": len(model.probs), "context": ORDER - 1, "seconds": perf_counter() - begin}
    facts |= {"checked": "reference/ngram.py"}
    return Rival(facts, lambda names, _: list(map(one, names)), one, exact)


def in_kenlm(model: KneserNey) -> Any:
    """The same n-grams as a model of KenLM."""
    options = kenlm.Config()
    options.show_progress, options.arpa_complain = False, kenlm.ARPALoadComplain.NONE
    with TemporaryDirectory() as folder:
        model.write_arpa(Path(folder, "names.arpa"))
        return kenlm.Model(str(Path(folder, "names.arpa")), options)


def train_network(name: str, steps: int | None, session: Session) -> Rival:
    """A network of `networks.NETWORKS`, which sees all of the name so far. It learns from the list alone."""
    begin, longest = perf_counter(), max(map(len, session.names))
    recipe = shortened(networks.NETWORKS[name].recipe, steps, session)
    network = networks.new_network(name, session.vocab, longest, recipe.seed, recipe.dropout)
    networks.fit(network, *split_names(session.names)[:2], recipe)
    one = lambda name: -network.nats(*session.vocab.encode([name], context=1))
    context = None if isinstance(network, networks.Recurrent) else longest + 1
    facts: Row = {"parameters": parameters(network), "context": context}
    facts |= {"seconds": perf_counter() - begin, "checked": "float64 without padding"}
    return Rival(facts, network.score, one, network.exact_scores, BATCHES, *all_threads())


@torch.enable_grad()
def train_ours(steps: int | None, session: Session) -> Rival:
    """The preset "fast"."""
    begin, recipe = perf_counter(), shortened(PRESETS["fast"][1], steps, session)
    model = new_model(WaveNetConfig(vocab_size=len(session.vocab)), recipe.seed)
    fit(model, session.vocab, *split_names(session.names)[:2], recipe)
    return ours(model, session.vocab, perf_counter() - begin, *all_threads())


def shortened(recipe: Recipe, steps: int | None, session: Session) -> Recipe:
    """A recipe of that many steps, or its own, and of the session's seed, which validates at its end alone."""
    steps = steps or recipe.steps
    return replace(recipe, steps=steps, eval_every=steps, seed=session.args.seed)


def load_default() -> Rival:
    """The model that ships; its seconds are those of its own training, teachers included."""
    trained = load_checkpoint("default")
    notes = trained.notes
    return ours(trained.model, trained.vocab, notes["seconds"], notes["threads"], all_threads()[1])


def ours(model: ConvWaveNet, vocab: Vocabulary, seconds: float, made_with: int, threads: Sequence[int]) -> Rival:
    """A model of this project: nodes shared across a list, and for one name the folded convolutional pass."""
    scorer, folded, context = Scorer(model, vocab), fold_batch_norm(model), model.context

    def one(name: str) -> Tensor:
        tokens, _ = vocab.encode([name], context=context)
        return -F.cross_entropy(folded(tokens)[0], F.pad(tokens[0, context:], (0, 1)), reduction="sum")

    facts: Row = {"parameters": parameters(model), "context": context, "seconds": seconds}
    facts |= {"checked": "windows in float64"}
    exact = partial(exact_scores, Models(reference.from_conv(model), vocab))
    return Rival(facts, lambda names, _: scorer.score(names), one, exact, (1,), made_with, threads)


def all_threads() -> tuple[int, list[int]]:
    """The number of PyTorch's threads, and those that networks score with: one, and all."""
    return torch.get_num_threads(), sorted({1, torch.get_num_threads()})
