"""What a sweep trains with: fixed settings and ranges, read from TOML and checked before the first trial."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UsageError
from ..model import WaveNetConfig
from ..training.recipe import PRESETS, Recipe
from .options import usage_errors

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

DEFAULT = Path(__file__).parent.parent / "sweep.toml"

# name: the types that a setting may have in TOML; a float may be written as an integer
SETTINGS: dict[str, tuple[type, ...]] = {
    **{field.name: (type(field.default),) for field in fields(Recipe)},
    "n_embd": (int,),
    "n_hidden": (int, list),
    "kernel_sizes": (list,),
    "batch_norm": (bool,),
    "bias": (bool,),
    "gated": (bool,),
}


@dataclass(frozen=True)
class Space:
    """The settings of a sweep.

    Attributes:
        path: for messages.
        preset: what the sweep starts from.
        fixed: the preset's settings and those that the file fixes.
        ranges: what is drawn, as in the file.
    """

    path: str
    preset: str
    fixed: dict[str, Any]
    ranges: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: str) -> Space:
        """The space in a TOML file, or "default"; raises `UsageError` naming the file, the key and the fix."""
        toml = imported("tomllib", "tomli")
        try:
            found = toml.loads((DEFAULT if path == "default" else Path(path)).read_bytes().decode())
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}; give a TOML file, or 'default'") from error
        except ValueError as error:
            raise UsageError(f"{path}: not TOML in UTF-8 ({error}); fix it there") from error
        preset = found.pop("preset", "fast")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UsageError(f"{path}: preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
        shape, recipe = PRESETS[preset]
        ranges = {name: value for name, value in found.items() if isinstance(value, dict)}
        fixed = {name: value for name, value in found.items() if name not in ranges}
        space = cls(path, preset, {**asdict(recipe), **shape, **fixed}, ranges)
        space._check(fixed)
        return space

    def configured(self, drawn: dict[str, Any], vocab_size: int) -> tuple[WaveNetConfig, Recipe]:
        """Model and recipe with the settings drawn; raises `UsageError` where they do not fit together."""
        settings = self.fixed | drawn
        recipe = {field.name: settings.pop(field.name) for field in fields(Recipe)}
        with usage_errors(ConfigError, f"{self.path}: "):
            return WaveNetConfig(vocab_size=vocab_size, **settings), Recipe(**recipe)

    def draw(self, trial: Trial) -> dict[str, Any]:
        """The settings of a new trial."""
        drawn: dict[str, Any] = {}
        for name, given in self.ranges.items():
            if "choices" in given:  # as JSON, since a storage takes no lists
                drawn[name] = json.loads(trial.suggest_categorical(name, [json.dumps(c) for c in given["choices"]]))
            else:
                suggest: Any = trial.suggest_int if int in SETTINGS[name] else trial.suggest_float
                drawn[name] = suggest(name, given["low"], given["high"], log=given.get("log", False))
        return drawn

    def settings(self, trial: FrozenTrial) -> dict[str, Any]:
        """The settings that a trial drew."""
        return {name: json.loads(v) if "choices" in self.ranges[name] else v for name, v in trial.params.items()}

    def _check(self, fixed: dict[str, Any]) -> None:
        """Rejects a space with a setting that is wrong in itself or beside the others, anywhere in its range."""
        for name in (*fixed, *self.ranges):
            if name not in SETTINGS:
                raise UsageError(f"{self.path}: {name} is not a setting; the settings are {', '.join(SETTINGS)}")
        ends = {name: self._ends(name, given) for name, given in self.ranges.items()}
        for name, values in (*((name, [value]) for name, value in fixed.items()), *ends.items()):
            types = SETTINGS[name]
            for value in values:
                if type(value) not in types and not (type(value) is int and float in types):
                    kinds = " or ".join(kind.__name__ for kind in types)
                    raise UsageError(f"{self.path}: {name} is {value!r}; it must be of type {kinds}")
        first = {name: values[0] for name, values in ends.items()}
        shape = [name for name in ends if not hasattr(Recipe, name)]
        for combination in product(*(ends[name] for name in shape)):  # these must fit together
            self.configured(first | dict(zip(shape, combination)), 27)
        for name in ends.keys() - shape:
            for value in ends[name]:
                self.configured(first | {name: value}, 27)

    def _ends(self, name: str, given: dict[str, Any]) -> list[Any]:
        """The choices, or the ends of the range: where they are valid, all values between are."""
        low: Any = given.get("low")
        choices, high, log = given.get("choices"), given.get("high"), given.get("log")
        if given.keys() == {"choices"} and isinstance(choices, list) and choices:
            return choices
        valid = given.keys() <= {"low", "high", "log"} and isinstance(log, bool | None)
        numbers = type(low) in (int, float) and type(high) in (int, float)
        if not (valid and numbers and low <= high and (low > 0 or not log)):
            raise UsageError(
                f"{self.path}: {name} is {given}; a range is {{low = 0.1, high = 1.0}} with low <= high, and "
                "log = true only where low is above 0; or {choices = [1, 2]} with at least one"
            )
        return [low, high]


def imported(*names: str) -> Any:
    """The first of these modules that is installed; raises `UsageError` where none is."""
    for name in names:
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise UsageError(f"a sweep needs {names[-1]}: pip install {names[-1]}")
