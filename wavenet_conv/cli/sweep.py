"""`wavenet-conv sweep`: many trainings with settings that Optuna draws, resumable, in one process or in many."""

from __future__ import annotations

import json
from typing import Any

from ..errors import OutputError, TrainingError, UsageError
from .options import add_command, add_device, add_list, check_output, positive

SHOWN = 10  # trials in the table

DESCRIPTION = """\
Trains with many settings, drawn by Optuna from SPACE.toml, and ranks the trials by the lowest validation loss. A trial
that is worse than the median of the earlier ones at the same step is stopped early. In SPACE.toml, `preset` names what
to start from; every other key is a field of Recipe or of WaveNetConfig: a plain value is fixed,
{low = 1e-3, high = 3e-2, log = true} is a range, and {choices = [128, 256]} a list to choose from. Trials have the
n-grams of the preset as teachers and no networks, so ngram_share and drawn are not settings.

Trials are kept in the storage: the same command adds those missing up to --trials, and several processes may run it at
once. In one process the same seed draws the same trials again.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv sweep`."""
    command = add_command(commands, sweep, "train with many settings and keep the best", DESCRIPTION)
    command.set_defaults(hint="; start again with the same arguments to continue")
    add = command.add_argument
    add("space", metavar="SPACE.toml", help="what is fixed and what is drawn; 'default' is the one in the package")
    add_list(command, "LIST")
    add("--trials", type=positive, default=30, metavar="N", help="trials in all, those of earlier runs included (30)")
    add("--storage", default="sqlite:///sweep.db", metavar="URL", help="where trials are kept (sqlite:///sweep.db)")
    add("--study", default="sweep", metavar="NAME", help="which of the storage's sweeps this is (sweep)")
    add_device(command)
    add("--output", metavar="FILE", help="train the best trial once more and write its checkpoint")
    add("--json", dest="as_json", action="store_true", help="all trials, best first, as one line of JSON")


def sweep(
    space: str,
    file: str,
    *,
    end: str | None,
    trials: int,
    storage: str,
    study: str,
    device: str,
    output: str | None,
    as_json: bool,
) -> None:
    """Run the command; the arguments are its options."""
    try:
        from .progress import Progress
        from .study import Work, storage_errors
    except ModuleNotFoundError as error:
        raise UsageError(f"a sweep needs {error.name}: pip install {error.name}") from error
    if output:
        check_output(output, file, space)
    work = Work(space, file, end, storage, study, device)
    with Progress(trials, every_update=True) as progress:
        with storage_errors(OutputError, storage, "fix that and start again to continue"):
            work.run(trials, progress)
            rows = [trial.user_attrs["row"] for trial in work.counted()]
        if rows[0]["state"] != "ended":
            raise TrainingError(f"none of {len(rows)} trials came to its end; the first: {rows[0]['state']}")
        if output:
            progress.say(f"training trial {rows[0]['trial']} again for {output}")
            work.save(rows[0], output)
    if as_json:
        print(json.dumps({"study": study, "trials": rows}))
        return
    ended = [row for row in rows if row["state"] == "ended"]
    print("trial  validation   train    step  seconds  parameters  settings")
    for row in ended[:SHOWN]:
        drawn = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["settings"].items())
        print(
            f"{row['trial']:5}  {row['validation_loss']:10.4f}  {row['train_loss']:6.4f}  {row['best_step']:6,}  "
            f"{row['seconds']:7.1f}  {row['parameters']:10,}  {drawn}"
        )
    print(f"{len(ended):,} trials ended, {len(rows) - len(ended):,} were stopped early or broke down")
