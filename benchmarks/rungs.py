"""The rungs of the ladder: how each is made from a list, and how it then scores and draws names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from math import log
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reference
from benchmarks import rivals, sizes
from benchmarks.drawing import Step, draw_names, ngram_drawer, window_step
from benchmarks.methods import WINDOW_BATCHES, parameters
from benchmarks.networks import NETWORKS, Recurrent, fit, new_network
from benchmarks.tables import Row
from reference.ngram import END, KneserNey
from wavenet_conv import ConvWaveNet, Scorer, Vocabulary, sample, training

BATCH_SIZE, LR = 32, 0.1  # of the lecture's recipe
NAME_BATCHES = (256, 1024, 64)  # names that a network scores together
DRAW_BATCHES = (1024, 4096, 256)  # names that a tree or a network draws side by side
ORDERS = range(2, 9)
KENLM_ORDER = 6  # the longest n-grams that KenLM reads as it is built for Python

Names = Sequence[str]


class Rung(NamedTuple):
    """What is made, by `make`; the rest is for the lecture's networks."""

    name: str
    make: Callable[[Rung, Parts], Made]
    network: str = ""  # of `reference.NETWORKS`
    published: float | None = None  # validation loss
    drop_at: int = 150_000  # the step, of 200,000, at which the rate becomes a tenth
    per_position: bool = False
    unscaled: bool = False  # parameters start as standard normals, as in part 2


@dataclass(frozen=True)
class Parts:
    """What rungs are made from, and how long they are trained."""

    train: Names
    validation: Names
    test: Names
    vocab: Vocabulary
    steps: int  # of the lecture's recipe
    share: float  # of the steps of every recipe
    seed: int
    # By preset and seed, with the seconds that they took: several presets share them.
    teachers: dict[tuple[str, int], tuple[ConvWaveNet, float]] = field(default_factory=dict)

    @cached_property
    def ngrams(self) -> KneserNey:
        """The n-grams that others are mixed with."""
        return KneserNey(self.train, self.vocab.characters, rivals.ORDER)


class Made(NamedTuple):
    """A rung that was made."""

    facts: Row  # parameters, context, steps; teachers' seconds if they were trained before
    score: Callable[[Names, int], Any]  # log-likelihoods of names, in batches of this size
    draw: Callable[[int, int, int], list[str]]  # so many names, with this seed, in batches of this size
    score_sizes: Sequence[int] = (1,)
    draw_sizes: Sequence[int] = (1,)
    log_probs: Callable[[Names], Tensor] | None = None  # of each position, name after name, float64


@torch.enable_grad()
def make(rung: Rung, parts: Parts) -> Made:
    """Makes a rung; the seconds are all that it takes until it can score, those of its teachers included."""
    begin = perf_counter()
    made = rung.make(rung, parts)
    seconds = perf_counter() - begin + made.facts.pop("seconds_before", 0.0)
    return made._replace(facts=made.facts | {"seconds": seconds, "recipe": recipe_of(rung.name, parts.seed)})


def recipe_of(name: str, seed: int) -> list[Row] | None:
    """What is made, its shape and its recipe where the rung has its own, then those of its teachers; as in JSON."""
    if name in NETWORKS:
        found = [tuple(NETWORKS[name])]
    elif name.startswith("ours-"):
        preset = name.removeprefix("ours-")
        found = [(preset, *training.PRESETS[preset]), *training.teachers_of(preset, seed)]
    else:
        return None
    return json.loads(json.dumps([dict(zip(("of", "shape", "recipe"), one)) for one in found], default=asdict))


class Bigrams(KneserNey):
    """Part 1's model: how often each token follows each other, every count raised by one."""

    def __init__(self, names: Names, characters: str):  # counts are not discounted, so nothing else is estimated
        self.characters, self.order, self.backoffs = characters, 2, {}
        counts = Counter(first + second for name in names for first, second in zip(END + name, name + END))
        tokens, totals = END + characters, Counter[str]()
        for pair, count in counts.items():
            totals[pair[0]] += count
        self.probs = {token: 1 / len(tokens) for token in tokens}  # an ARPA file has to name all tokens
        self.probs |= {a + b: (counts[a + b] + 1) / (totals[a] + len(tokens)) for a in tokens for b in tokens}


def make_bigrams(rung: Rung, parts: Parts) -> Made:
    made = of_ngrams(Bigrams(parts.train, parts.vocab.characters))
    return made._replace(facts=made.facts | {"parameters": len(parts.vocab) ** 2})


def make_kneser_ney(rung: Rung, parts: Parts) -> Made:
    return of_ngrams(KneserNey(parts.train, parts.vocab.characters, int(rung.name.rpartition("-")[2])))


def of_ngrams(model: KneserNey) -> Made:
    """KenLM scores where it is installed and can hold the model, else Python; Python draws."""
    score: Any = lambda names, _: list(map(model.log_prob, names))
    facts: Row = {"parameters": len(model.probs), "context": model.order - 1, "steps": 0, "scored_by": "Python"}
    if rivals.kenlm is not None and model.order <= KENLM_ORDER:
        with suppress(ValueError):  # an ARPA file cannot hold one of the characters
            loaded = rivals.in_kenlm(model)
            one = lambda name: loaded.score(" ".join(name), bos=True, eos=True) * log(10)
            score, facts["scored_by"] = lambda names, _: list(map(one, names)), "KenLM"
    draw = ngram_drawer(model)
    return Made(facts, score, lambda count, seed, _: draw(count, seed))


class Folded(NamedTuple):
    """What `sizes.by_windows` reads of a tree."""

    folded_tree: reference.Sequential
    vocab: Vocabulary
    context: int
    device: torch.device = torch.device("cpu")


def make_tree(rung: Rung, parts: Parts) -> Made:
    """One of the lecture's networks by the lecture's recipe; weights and minibatches come from one generator."""
    generator = torch.Generator().manual_seed(parts.seed)
    shape: dict[str, Any] = {**reference.NETWORKS[rung.network][0], "vocab_size": len(parts.vocab)}
    tree = reference.build(**shape, per_position=rung.per_position, generator=generator)
    for parameter in tree.parameters() if rung.unscaled else ():
        parameter.data.normal_(generator=generator)
    context, drop_at = reference.context_of(tree), round(rung.drop_at * parts.share)
    X, Y = reference.examples(parts.train, parts.vocab.characters, context)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "lr": LR, "drop_at": drop_at, "generator": generator}
    reference.train(tree, X, Y, steps=parts.steps, **options)
    tree.eval()
    # Statistics per position do not fold into one linear map.
    folded: Any = Folded(tree if rung.per_position else reference.fold_batch_norm(tree), parts.vocab, context)
    facts: Row = {"parameters": parameters(tree), "context": context, "steps": parts.steps, "scored_by": "windows"}
    draw = drawer(window_step(folded.folded_tree, context), parts.vocab)
    return Made(facts, partial(sizes.by_windows, folded), draw, WINDOW_BATCHES["cpu"][:3], DRAW_BATCHES)


def make_network(rung: Rung, parts: Parts) -> Made:
    """One of `networks.NETWORKS` by its own recipe, shortened as the ladder is: the best weights."""
    recipe = NETWORKS[rung.name].recipe
    recipe = replace(recipe, steps=max(1, int(recipe.steps * parts.share)), seed=parts.seed)
    longest = max(map(len, (*parts.train, *parts.validation, *parts.test)))
    network = new_network(rung.name, parts.vocab, longest, recipe.seed, recipe.dropout)
    steps = fit(network, parts.train, parts.validation, recipe).steps
    context = None if isinstance(network, Recurrent) else longest + 1
    facts: Row = {"parameters": parameters(network), "context": context, "steps": steps, "scored_by": "batches"}
    log_probs = partial(network.position_log_probs, batch_size=NAME_BATCHES[0])
    return Made(facts, network.score, drawer(network.step, parts.vocab), NAME_BATCHES, DRAW_BATCHES, log_probs)


def drawer(step: Step, vocab: Vocabulary) -> Callable[[int, int, int], list[str]]:
    """A function of a count, a seed and a batch size."""
    return lambda count, seed, size: draw_names(step, vocab, count, torch.Generator().manual_seed(seed), size)


def make_ours(rung: Rung, parts: Parts) -> Made:
    """One of our presets by its own recipe, shortened as the ladder is: the best weights."""
    preset, before = rung.name.removeprefix("ours-"), 0.0
    fitted = partial(training.fit_preset, vocab=parts.vocab, train=parts.train, valid=parts.validation)
    for name, _, recipe in training.teachers_of(preset, parts.seed):
        key, begin = (name, recipe.seed), perf_counter()
        if key in parts.teachers:
            before += parts.teachers[key][1]
        else:
            model = fitted(name, seed=recipe.seed, steps=parts.share).model
            parts.teachers[key] = model, perf_counter() - begin
    models = {key: model for key, (model, _) in parts.teachers.items()}
    trainer = fitted(preset, seed=parts.seed, steps=parts.share, trained=models)
    model, scorer = trainer.model, Scorer(trainer.model, parts.vocab)
    facts: Row = {"parameters": parameters(model), "context": model.context, "steps": trainer.step}
    facts |= {"scored_by": "Scorer", "seconds_before": before}
    draw = lambda count, seed, _: sample(model, parts.vocab, count, seed=seed)
    log_probs = lambda names: scorer.position_log_probs(names)[0].double()
    return Made(facts, lambda names, _: scorer.score(names), draw, log_probs=log_probs)


# Parts 1, 2 and 3 of the lectures, then part 5's log; parts 2 and 3 drop the rate at half time.
LECTURE = (
    Rung("bigram", make_bigrams, published=2.454),  # part 1, of the whole list
    # The wild start leaves its mark to the end: seeds 42, 1 and 2147483647 give 2.158, 2.180 and 2.162.
    Rung("mlp-10-200-unscaled", make_tree, "mlp-10-200", 2.168, drop_at=100_000, unscaled=True),
    Rung("mlp-10-200", make_tree, "mlp-10-200", 2.107, drop_at=100_000),
    Rung("mlp-bn", make_tree, "mlp-bn", 2.105),
    Rung("flat", make_tree, "flat", 2.027),
    Rung("tree-68-bug", make_tree, "tree-68", 2.029, per_position=True),
    Rung("tree-68", make_tree, "tree-68", 2.022),
    Rung("wide", make_tree, "wide", 1.993),
)
NGRAMS = tuple(Rung(f"kneser-ney-{order}", make_kneser_ney) for order in ORDERS)
RIVALS = tuple(Rung(name, make_network) for name in NETWORKS)
OURS = tuple(Rung(f"ours-{name}", make_ours) for name in training.PRESETS)
RUNGS = {rung.name: rung for rung in (*LECTURE, *NGRAMS, *RIVALS, *OURS)}
