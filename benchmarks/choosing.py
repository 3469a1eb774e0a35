"""What should I use: a table of counts, an LSTM, a transformer, or this project?

All are made from the training part of one list, and their loss, in nats per character, is that of its validation part.
Equality comes first: scores that differ from those of a slow definition end the run with exit code 1 and no timings.
Every method takes strings and returns log-likelihoods, and all take turns on the clock. The seconds to make a method
stand in the row with the threads that made it.

The row of `ours-gated` is from the ladder's run.

The published run reads the lecture's list, uses the extra `bench`, and takes six minutes on two cores.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, networks, output, rivals
from benchmarks.counting import outputs
from benchmarks.harness import Benchmark, Results, Session, Sized, call_rows, rows_at_best, spread
from benchmarks.rivals import Names, Rival, make_rivals
from benchmarks.tables import Row, Table
from wavenet_conv import WaveNetConfig
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.errors import UsageError
from wavenet_conv.names import LECTURE_SHA256, lecture_names
from wavenet_conv.training import PRESETS, split_names

QUICK_STEPS = 150  # of each network; --full: those of its recipe
TOLERANCE = 1e-4  # of a name's log-likelihood, in nats
ALONE = 100  # names whose scores one by one are checked
ROOT = Path(__file__).parent.parent
NOTE = "Not the lecture's list: the model that ships may have been trained on some of these validation names."
NO_KENLM = "KenLM is not installed, so Python scores the n-grams: pip install kenlm."


def lecture_list() -> str:
    """The path of the lecture's list, or of `names.txt` where that is not on this machine."""
    return str(lecture_names() or ROOT / "names.txt")


def run(session: Session) -> Iterator[Results]:
    """All results; where scores differ, nothing after the equality."""
    names, path, steps = session.names, Path(session.args.names), session.pick(QUICK_STEPS, None)
    if len(names) < 10:
        raise UsageError(f"--names {path}: {len(names)} names leave nothing to validate on; give at least 10")
    if unknown := set("".join(names)) - set(load_checkpoint("default").vocab.characters):
        raise UsageError(f"--names {path}: the default model does not know {min(unknown)!r}; give names of a to z")
    train, valid, _ = split_names(names)
    used = {"file": path.name, "of": len(names), "train": len(train), "validation": len(valid)}
    methods, some = make_rivals(steps, session), names[:: session.pick(10, 1)]
    differences = {name: largest_difference(rival, some) for name, rival in methods.items()}
    equal = all(difference <= TOLERANCE for difference in differences.values())  # a NaN is not
    equality = {"equal": equal, "tolerance": TOLERANCE, "max_abs_diffs": differences}
    yield {"model": trained(steps), "names": used, "equality": equality}
    if not equal:
        return
    in_lecture = hashlib.sha256(path.read_bytes()).hexdigest() == LECTURE_SHA256
    notes = [NOTE] * (not in_lecture) + [NO_KENLM] * (rivals.kenlm is None)
    yield {"notes": notes, "methods": timed_rows(methods, some, valid, session) + ladder_rows() * in_lecture}


def trained(steps: int | None) -> Results:
    """How the networks were made: the steps of ours, and the others' shapes and recipes."""
    found: Results = {"steps": steps or PRESETS["fast"][1].steps}
    for name, network in rivals.NETWORKS.items():
        _, shape, recipe = networks.NETWORKS[network]
        chosen = {key: getattr(recipe, key) for key in ("batch_size", "lr", "warmup", "weight_decay", "dropout")}
        found[name] = {**shape, "steps": steps or recipe.steps, **chosen}
    return found


def largest_difference(rival: Rival, names: Names) -> float:
    """From the exact log-likelihood of a name, scored in the list and alone; NaN where there is one."""
    exact = torch.as_tensor(rival.exact(names), dtype=torch.float64)
    whole = exact - torch.as_tensor(rival.score(names, rival.sizes[0]))
    alone = exact[:ALONE] - torch.tensor([float(rival.one(name)) for name in names[:ALONE]])
    return float(torch.cat([whole, alone]).abs().max())


def timed_rows(methods: dict[str, Rival], names: Names, valid: Names, session: Session) -> list[Row]:
    """A row per method and number of threads: its loss, and its speed on the list and on one name at a time."""
    pairs = [(name, threads) for name, rival in methods.items() for threads in rival.threads]
    before, positions, config = torch.get_num_threads(), outputs(names), WaveNetConfig()
    lists: dict[Any, Sized] = {}
    calls: dict[Any, Callable[[], Any]] = {}
    for name, threads in pairs:
        rival = methods[name]
        lists[name, threads] = Sized(partial(score_list, rival, threads, names, positions), rival.sizes)
        calls[name, threads] = partial(score_next, rival, threads, cycle(names))
    whole = rows_at_best(lists, "position", config, session.pick(3, 9), "whole list", session)
    one = call_rows(calls, session.pick(200, 2000), "one name", session, unprofiled=pairs)
    torch.set_num_threads(before)
    rows = []
    for (name, threads), on_list, on_one in zip(pairs, whole, one):
        rival = methods[name]
        row = {"method": name, "threads": threads} | rival.facts
        row |= {"validation_loss": loss_of(rival.score(valid, rival.sizes[0]), valid), "batch": on_list["batch"]}
        row |= {key: value for key, value in on_list.items() if "positions_per_second" in key}
        row |= {key: on_one[key] for key in ("us", "q1_us", "q3_us")}
        rows.append(row if threads == rival.made_with else row | {"seconds": None})
    return rows


def score_list(rival: Rival, threads: int, names: Names, positions: int, size: int) -> int:
    """Scores a list in batches of this size; returns its positions."""
    use_threads(threads)
    rival.score(names, size)
    return positions


def score_next(rival: Rival, threads: int, names: Iterator[str]) -> None:
    """Scores the next name, alone."""
    use_threads(threads)
    rival.one(next(names))


def use_threads(threads: int) -> None:
    """Sets PyTorch's threads; asking first is cheaper where they are the same, as inside a block of calls."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def loss_of(scores: Any, names: Names) -> float:
    """Nats per position, of the log-likelihoods of names."""
    return -float(torch.as_tensor(scores, dtype=torch.float64).sum()) / outputs(names)


def ladder_rows() -> list[Row]:
    """The preset "gated", which takes long to train, from the committed run of the ladder, on one thread."""
    rungs = output.published(output.RESULTS / "ladder-cpu.json")["rungs"]
    (rung,) = (row for row in rungs if row["rung"] == "ours-gated")
    keys = ("parameters", "context", "validation_loss", "seconds", *spread("positions_per_second", [0.0]))
    return [{"method": rung["rung"], "threads": 1} | {key: rung[key] for key in keys}]


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    yield Table(
        "What each takes, and what it gives",
        "method; threads; parameters or n-grams=parameters ,; context; validation loss=validation_loss .4f; "
        "seconds to make=seconds ,.1f; positions/s=positions_per_second ,.0f; quartiles=~positions_per_second ,.0f; "
        "one name: us=us ,.1f; quartiles=~us ,.1f; scores checked against=checked",
        results["methods"],
        " ".join(results["notes"]),
    )


main = partial(harness.main, Benchmark("choosing", __doc__, run, tables, devices=("cpu",), default_names=lecture_list))

if __name__ == "__main__":
    sys.exit(main())
