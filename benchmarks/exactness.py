"""What are exact batch statistics worth in training?

In training, batch norm takes mean and variance from the batch, so it matters how often a node counts. The tree computes
a node once per window that contains it; a network on whole names computes it once. Here the lecture's network is
trained from the same weights on the same batches, by the preset "fast" without its n-grams, in four ways:

- multiplicities: `ConvWaveNet.forward` on a padded batch of whole names. A node counts once per window that contains
  it, as in the tree.
- plain: the same, but each node of a real window counts once.
- padded: the same, but each node of the padded batch counts once, also behind the end of a name. `nn.BatchNorm1d`
  counts so.
- shared: what `fit` does. Each distinct node is computed once, and counts as in the tree.

No loss includes what is behind the end of a name. Equality comes first: where one step in float64 by `multiplicities`
or `shared` has another loss, gradient or statistic than the tree on all windows, or where these two part in the first
steps, the run ends with exit code 1 and trains nothing. The other two differ from the tree, by as much as the first
table says.

The losses are of whole lists in evaluation mode, with the weights of the lowest validation loss. The seconds are of the
steps and of preparing the lists; the ways take turns on the clock, and evaluations are off it.

Exact statistics do not train a better network: the median losses of the four ways are within 0.005 nats, and seeds of
one way differ as much. What they give is equality: with them, training on shared nodes is the tree's training, up to
rounding, in a third of the time of `multiplicities`.

The published run reads the lecture's list and takes six minutes on two cores.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.choosing import lecture_list
from benchmarks.harness import Benchmark, Results, Session, now
from benchmarks.tables import Row, Table
from benchmarks.train import from_the_tree, mapped, new_tree, shared_loss, worst
from wavenet_conv import ConvWaveNet, Vocabulary
from wavenet_conv.errors import UsageError
from wavenet_conv.training import PRESETS, Corpus, Recipe, Trainer, evaluate, split_names
from wavenet_conv.training.trainer import new_optimizer

# `WholeNames` has no teachers, no dropout, which `Trainer` draws per distinct node, and keeps no moving average.
RECIPE = replace(PRESETS["fast"][1], ngram_share=0.0, dropout=0.0, ema_decay=0.0)
STEPS, QUICK_STEPS = RECIPE.steps, 20
SEEDS = 3
TOLERANCE = 1e-10  # of a float64 loss, gradient and statistic
FIRST = 5  # steps in which the losses of the exact ways are compared
MEASURED = ("train_loss", "validation_loss", "test_loss", "seconds")


class Plain(ConvWaveNet):
    """Counts each node of a real window once."""

    def multiplicities(self, tokens: Tensor, lengths: Tensor | None = None) -> Sequence[Tensor | None]:
        """Per layer, and then for the head, `(batch, 1, time)`: 1 for a node of a window, 0 for one of none."""
        counts = super().multiplicities(tokens, lengths)
        return [None if count is None else (count > 0).to(count) for count in counts]


class Padded(ConvWaveNet):
    """Counts each node of the padded batch once."""

    def multiplicities(self, tokens: Tensor, lengths: Tensor | None = None) -> Sequence[Tensor | None]:
        """Per layer, and then for the head, None: all nodes count alike."""
        return [None] * (len(self.layers) + 1)


WAYS = {"multiplicities": ConvWaveNet, "plain": Plain, "padded": Padded, "shared": ConvWaveNet}
EXACT = ("multiplicities", "shared")


class WholeNames(Trainer):
    """Takes the steps of `Trainer`, on the same names, by `ConvWaveNet.forward` on padded batches of whole names."""

    def __init__(
        self, model: ConvWaveNet, vocab: Vocabulary, train: Sequence[str], valid: Sequence[str], recipe: Recipe
    ):
        super().__init__(model, vocab, train, valid, recipe)
        self.optimizer, self.schedule = new_optimizer(model, recipe)
        encoded = vocab.encode(train, context=model.context)
        self.tokens, self.lengths = (part.to(self.device) for part in encoded)

    def advance(self) -> None:
        """Take one step."""
        rows = self.next_rows()
        lengths = self.lengths[rows]
        tokens = self.tokens[rows, : self.model.context + int(lengths.max())]  # padded to the batch's longest
        self.optimizer.zero_grad()
        loss = padded_loss(self.model, tokens, lengths)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.losses.append(loss.detach())


def padded_loss(model: ConvWaveNet, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The mean loss of a padded batch over the positions of its names."""
    following = F.pad(tokens[:, model.context :], (0, 1))
    inside = torch.arange(following.shape[1], device=tokens.device) <= lengths[:, None]
    return F.cross_entropy(model(tokens, lengths)[inside], following[inside])


def whole_loss(conv: ConvWaveNet, names: list[str], session: Session) -> Tensor:
    """The mean loss of `names` as one padded batch."""
    return padded_loss(conv, *(part.to(session.device) for part in session.vocab.encode(names, context=conv.context)))


@torch.enable_grad()
def run(session: Session) -> Iterator[Results]:
    """All results; where a step differs, nothing after the equality."""
    names, path = session.names, Path(session.args.names)
    if len(names) < 10:
        raise UsageError(f"--names {path}: {len(names)} names leave nothing to validate on; give at least 10")
    recipe, parts = replace(RECIPE, steps=session.pick(QUICK_STEPS, STEPS)), split_names(names)
    used = {"file": path.name, "of": len(names)} | dict(zip(("train", "validation", "test"), map(len, parts)))
    yield {"names": used, "recipe": asdict(recipe), "threads": torch.get_num_threads()}
    rows = [step_row(way, parts[0][: recipe.batch_size], session) for way in WAYS]
    yield {"one_step": rows, "equality": (found := equality(rows, recipe, parts, session))}
    if not found["equal"]:
        return
    tick, rows = session.ticks("steps", SEEDS * len(WAYS) * recipe.steps), []
    for seed in range(session.args.seed, session.args.seed + SEEDS):
        rows += training_rows(seed, recipe, parts, session, tick)
        yield {"trainings": rows}
    yield {"ways": [way_row(way, rows) for way in WAYS]}


def step_row(way: str, names: list[str], session: Session) -> Row:
    """One step of a way in float64: how far it is from the tree's."""
    loss = shared_loss if way == "shared" else whole_loss
    return {"way": way} | from_the_tree(loss, names, session, WAYS[way])


Parts = tuple[list[str], list[str], list[str]]


def equality(rows: list[Row], recipe: Recipe, parts: Parts, session: Session) -> Results:
    """Whether the exact ways are the tree's in one step, and alike in the first steps of a training in float64."""
    differences = {row["way"]: worst(row[key] for key in row if key != "way") for row in rows if row["way"] in EXACT}
    losses = []
    for way in EXACT:
        trainer = new_trainer(way, session.args.seed, recipe, parts, session, torch.float64)
        for _ in range(FIRST):
            trainer.advance()
        losses.append(torch.stack(trainer.losses))
    differences[f"their losses in {FIRST} steps"] = float((losses[0] - losses[1]).abs().max())
    equal = all(difference < TOLERANCE for difference in differences.values())  # a NaN is not
    return {"equal": equal, "tolerance": TOLERANCE, "max_abs_diffs": differences}


def new_trainer(
    way: str, seed: int, recipe: Recipe, parts: Parts, session: Session, dtype: torch.dtype = torch.float32
) -> Trainer:
    """A training by a way: the seed gives the tree's weights and the order of the names, the same for all ways."""
    model = mapped(new_tree(seed, session, dtype), WAYS[way])
    kind = Trainer if way == "shared" else WholeNames
    return kind(model, session.vocab, parts[0], parts[1], replace(recipe, seed=seed))


def training_rows(seed: int, recipe: Recipe, parts: Parts, session: Session, tick: Callable[[], None]) -> list[Row]:
    """A training of each way, all in turn from validation to validation."""
    trainers, seconds = dict[str, Trainer](), dict[str, float]()
    for way in WAYS:
        begin = now(session.device)
        trainers[way] = new_trainer(way, seed, recipe, parts, session)
        seconds[way] = now(session.device) - begin
        trainers[way].validate()
    for start in range(0, recipe.steps, recipe.eval_every):
        for way, trainer in trainers.items():
            begin = now(session.device)
            for _ in range(min(recipe.eval_every, recipe.steps - start)):
                trainer.advance()
                tick()
            seconds[way] += now(session.device) - begin
            trainer.validate()
    return [finished_row(way, seed, seconds[way], trainer, parts[2], session) for way, trainer in trainers.items()]


def finished_row(way: str, seed: int, seconds: float, trainer: Trainer, test: list[str], session: Session) -> Row:
    """What a training came to, with its best weights."""
    trainer.model.load_state_dict(trainer.best_weights)
    losses = {"validation_loss": trainer.best_loss}
    losses |= {"train_loss": evaluate(trainer.model, trainer.train_corpus)}
    losses |= {"test_loss": evaluate(trainer.model, Corpus(test, session.vocab, trainer.model))}
    return {"way": way, "seed": seed, "best_step": trainer.best_step, **losses, "seconds": seconds}


def way_row(way: str, rows: list[Row]) -> Row:
    """Of all seeds, the median, lowest and highest of what is measured, and the median distance to the exact way."""
    of_way, exact = ([row for row in rows if row["way"] == name] for name in (way, "multiplicities"))
    result: Row = {"way": way}
    for key in MEASURED:
        values = [row[key] for row in of_way]
        result |= {key: statistics.median(values), f"lowest_{key}": min(values), f"highest_{key}": max(values)}
    for key in ("validation_loss", "test_loss"):
        result[f"{key}_more"] = statistics.median(row[key] - other[key] for row, other in zip(of_way, exact))
    return result


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    yield Table(
        f"One step on {results['recipe']['batch_size']} names in float64: largest differences from the tree",
        "way; loss=loss .1e; gradients=gradients .1e; running statistics=statistics .1e",
        results["one_step"],
    )
    steps = results["recipe"]["steps"]
    short = "" if steps == STEPS else " A short run: it shows that it runs, and proves nothing."
    yield Table(
        f"{SEEDS} seeds of each way: medians",
        "way; train=train_loss .4f; validation=validation_loss .4f; lowest=lowest_validation_loss .4f; "
        "highest=highest_validation_loss .4f; more than multiplicities=validation_loss_more +.4f; "
        "test=test_loss .4f; more than multiplicities=test_loss_more +.4f; "
        "seconds=seconds .1f; lowest=lowest_seconds .1f; highest=highest_seconds .1f",
        results["ways"],
        "Losses in nats per position. More than multiplicities: the median of the differences at the same seed. "
        f"{steps:,} steps on {results['threads']} threads.{short}",
    )
    yield Table(
        "Each training",
        "way; seed; best step=best_step ,; train=train_loss .4f; validation=validation_loss .4f; test=test_loss .4f; "
        "seconds=seconds .1f",
        results["trainings"],
    )


main = partial(harness.main, Benchmark("exactness", __doc__, run, tables, devices=("cpu",), default_names=lecture_list))

if __name__ == "__main__":
    sys.exit(main())
