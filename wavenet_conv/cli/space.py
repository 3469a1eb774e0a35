"""What a sweep trains with: fixed settings and ranges, read from TOML."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UsageError
from ..model import WaveNetConfig
from ..recipe import PRESETS, Recipe
from .options import usage_errors

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

DEFAULT = Path(__file__).parent.parent / "sweep.toml"

# name: the types that a setting may have in TOML; a float may be written as an integer
SETTINGS: dict[str, tuple[type, ...]] = {
    **{
        field.name: (float, int) if type(field.default) is float else (type(field.default),) for field in fields(Recipe)
    },
    "n_embd": (int,),
    "n_hidden": (int, list),
    "kernel_sizes": (list,),
    "batch_norm": (bool,),
    "bias": (bool,),
    "gated": (bool,),
}


@dataclass(frozen=True)
class Space:
    """The settings of a sweep: its path and preset, what is fixed (by the file or the preset), and what is drawn."""

    path: str
    preset: str
    fixed: dict[str, Any]
    ranges: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: str) -> Space:
        """The space in a TOML file, or "default"; raises `UsageError` naming the file, the key and the fix."""
        try:
            import tomllib
        except ModuleNotFoundError:  # Python 3.10
            import tomli as tomllib
        try:
            found = tomllib.loads((DEFAULT if path == "default" else Path(path)).read_bytes().decode())
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}; give a TOML file, or 'default'") from error
        except ValueError as error:
            raise UsageError(f"{path}: not TOML in UTF-8 ({error}); fix it there") from error
        preset = found.pop("preset", "fast")
        if preset not in list(PRESETS):
            raise UsageError(f"{path}: preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
        shape, recipe = PRESETS[preset]
        ranges = {name: value for name, value in found.items() if isinstance(value, dict)}
        fixed = {name: value for name, value in found.items() if name not in ranges}
        space = cls(path, preset, {**asdict(recipe), **shape, **fixed}, ranges)
        ends = {name: given.get("choices") or [given.get("low"), given.get("high")] for name, given in ranges.items()}
        for name, values in {**{name: [value] for name, value in fixed.items()}, **ends}.items():
            space._check(name, values)
        first = {name: values[0] for name, values in ends.items()}
        space.configured(first, 27)
        for name, values in ends.items():  # where the ends of a range are valid, all values between are
            for value in values:
                space.configured(first | {name: value}, 27)
        return space

    def configured(self, drawn: dict[str, Any], vocab_size: int) -> tuple[WaveNetConfig, Recipe]:
        """Model and recipe with the settings drawn; raises `UsageError` where they do not fit together."""
        settings = self.fixed | drawn
        recipe = {field.name: settings.pop(field.name) for field in fields(Recipe)}
        with usage_errors(ConfigError, f"{self.path}: "):
            return WaveNetConfig(vocab_size=vocab_size, **settings), Recipe(**recipe)

    def draw(self, trial: Trial) -> dict[str, Any]:
        """The settings of a new trial."""
        for name, given in self.ranges.items():
            if "choices" in given:  # as JSON, since a storage takes no lists
                trial.suggest_categorical(name, [json.dumps(choice) for choice in given["choices"]])
            else:
                suggest: Any = trial.suggest_float if float in SETTINGS[name] else trial.suggest_int
                suggest(name, given["low"], given["high"], log=given.get("log", False))
        return self.drawn(trial)

    def drawn(self, trial: Trial | FrozenTrial) -> dict[str, Any]:
        """The settings that a trial drew."""
        return {name: json.loads(v) if "choices" in self.ranges[name] else v for name, v in trial.params.items()}

    def _check(self, name: str, values: list[Any]) -> None:
        """Rejects an unknown setting, values of a wrong type, and a range without an order."""
        if name not in SETTINGS:
            raise UsageError(f"{self.path}: {name} is not a setting; the settings are {', '.join(SETTINGS)}")
        given = self.ranges.get(name, {})
        for value in values:
            if type(value) not in SETTINGS[name]:
                kind = SETTINGS[name][0].__name__
                fix = f"a value of type {kind}, {{low = ..., high = ...}} or {{choices = [...]}} with such values"
                raise UsageError(f"{self.path}: {name} is {given or value!r}; give {fix}")
        if "low" in given and not (values[0] <= values[-1] and (values[0] > 0 or not given.get("log"))):
            raise UsageError(f"{self.path}: {name} is {given}; give low <= high, and with log = true low above 0")
