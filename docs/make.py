"""Writes the generated parts of the README and of the pages: `python docs/make.py`.

A page marks such a part by `<!-- generated: NAME -->` and `<!-- end -->`, each on a line of its own. NAME is one of

- `headline`: the README's table;
- `modules`: the first line of every file of Python;
- `commands`: the options of all commands;
- `presets`: the recipe of each preset;
- `benchmarks`: all results, with how to read them;
- the name of a file of results, such as `slide-cpu.json`: its tables;
- the full name of a function: its source.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib import import_module
from inspect import cleandoc, getsource
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are not installed

from benchmarks.output import RESULTS, published
from benchmarks.tables import summary, value_at
from wavenet_conv.cli import new_parser
from wavenet_conv.errors import UsageError
from wavenet_conv.files import write_whole
from wavenet_conv.recipe import PRESETS, Recipe

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PART = re.compile(r"(?<=^<!-- generated: )([\w.-]+) -->\n.*?(?=^<!-- end -->$)", re.DOTALL | re.MULTILINE)
USAGE = {"?": "[{}]", "*": "[{} ...]", "+": "{} ..."}  # how an argument's number is written
ORDER = ("slide", "score", "sample", "train", "ladder")  # what is not in it comes after
FIGURES = {
    "score": "![Microseconds per name against the number of names in a call, one curve per method](figures/sizes.svg)",
    "ladder": "![Validation loss against parameters, and against seconds of training, a point per rung]"
    "(figures/ladder.svg)",
}


def modules() -> Iterator[str]:
    """Every file of the package, the tree and the benchmarks, with what it says of itself in its first line."""
    rows = ["| file | what it does |", "| --- | --- |"]
    for folder in ("wavenet_conv", "reference", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (len(path.parts), path)):
            first = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
            rows += [f"| `{path.relative_to(ROOT).as_posix()}` | {escaped(first)} |"]
    yield "\n".join(rows)


def presets() -> Iterator[str]:
    """The fields of `Recipe` in which presets differ, a column per preset."""
    recipes = {name: asdict(recipe) for name, (_, recipe) in PRESETS.items()}
    rows = [["setting", *(f"`{name}`" for name in recipes)], ["---", *["--:"] * len(recipes)]]
    for field in asdict(Recipe()):
        values = [recipe[field] for recipe in recipes.values()]
        if len({*values}) > 1:
            rows.append([f"`{field}`", *(f"{value:,}" for value in values)])
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)


def commands() -> Iterator[str]:
    """Every command: how it is called, what it does, and its options."""
    for parser in subparsers(new_parser()):
        positionals = [action for action in actions(parser) if not action.option_strings]
        words = [USAGE.get(str(action.nargs), "{}").format(name_of(action)) for action in positionals]
        yield f"## {parser.prog}"
        yield f"`{' '.join([parser.prog, '[OPTIONS]', *words])}`"
        yield from (escaped(part) for part in cleandoc(parser.description or "").split("\n\n"))
        yield from options(parser)


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table of a command's arguments, if it has any."""
    rows = []
    for action in actions(parser):
        call = ", ".join(action.option_strings)
        must = " (required)" if action.option_strings and action.required else ""
        if action.nargs != 0:
            call = f"{call} {name_of(action)}".strip()
        rows.append(f"| `{call}` | {escaped(action.help or '')}{must} |")
    if rows:
        yield "\n".join(["| argument | meaning |", "| --- | --- |", *rows])


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser, without `--help`."""
    return [action for action in parser._actions if action.dest != "help"]  # noqa: SLF001, there is no public way


def subparsers(parser: argparse.ArgumentParser) -> Iterable[argparse.ArgumentParser]:
    """The parsers of the commands."""
    choices: Any = next(action.choices for action in actions(parser) if action.nargs == argparse.PARSER)
    return choices.values()


def name_of(action: argparse.Action) -> str:
    """What stands for the value of an argument."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
    return str(action.metavar or choices or action.dest.upper())


def escaped(text: str) -> str:
    """Text with what Markdown would read; options and settings are set as code."""
    parts = re.split(r"(`[^`]*`|(?<![\w-])--?[a-z][\w-]*(?: (?:[A-Z]{2,}|[A-Z])\b)?|\{[^}]* = [^}]*\}|(?:\\.)+)", text)
    return "".join(part if not i % 2 or part[0] == "`" else f"`{part}`" for i, part in enumerate(parts))


class Task(NamedTuple):
    """A row of the README's table, and where its figures are."""

    task: str
    rival: str
    rows: str  # the results, and the path of the rows in them
    key: str
    rivals_method: str
    our_method: str
    only: dict[str, Any] = {}  # noqa: RUF012, what else the rows have in common
    amount: int = 1  # how many units of the key the task has

    def __str__(self) -> str:
        benchmark, _, path = self.rows.partition(".")
        rows = value_at(published(RESULTS / f"{benchmark}-cpu.json"), path)
        found = {row["method"]: row[self.key] for row in rows if self.only.items() <= row.items()}
        rival, ours = (self._seconds(found[method]) for method in (self.rivals_method, self.our_method))
        link = f"[{rival / ours:.3g}](docs/benchmarks.md#{benchmark})"
        return f"| {self.task} | {self.rival} | {duration(rival)} | {duration(ours)} | {link} |"

    def _seconds(self, value: float) -> float:
        return self.amount / value if "per_second" in self.key else value / (1e3 if self.key == "ms" else 1e6)


def duration(seconds: float) -> str:
    """A time in the unit that fits it, with three digits."""
    unit, name = next(unit for unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if seconds * unit[0] >= 1)
    return f"{seconds * unit:.3g} {name}"


WINDOWS, TREE, BIG = "the tree, all windows as one batch", "windows_folded", {"names": 256}
DISTINCT = "the tree, each distinct window once"
NAMES, SPEED = "the tree, many names as one batch", "positions_per_second"
OUTPUTS, DRAWN = 228_146, 524_288  # of the lecture's list, and names in the run of `sample`
TASKS = (
    Task("score 32,033 names", DISTINCT, "score.methods", SPEED, "windows_distinct", "shared", amount=OUTPUTS),
    Task("draw 524,288 names", NAMES, "sample.methods", "names_per_second", TREE, "sample", amount=DRAWN),
    Task("a training step on 256 names", WINDOWS, "train.throughput", "ms", "windows", "shared", BIG),
    Task("all predictions of one name", WINDOWS, "slide.one_name", "us", TREE, "slid"),
    Task(
        "each prediction of a text; context 1,024, random weights",
        *(WINDOWS, "slide.growth.7.methods", "us_per_position", "windows", "slid"),
    ),
)


def headline() -> Iterator[str]:
    """Per task, the strongest rival and this project, from the same run."""
    yield "\n".join(
        [
            "| task | a simple way | its time | this library | speed-up |",
            "| --- | --- | --: | --: | --: |",
            *map(str, TASKS),
        ]
    )


def benchmarks() -> Iterator[str]:
    """Every file of results: the question, how to read the answer, what was run, and the tables."""
    place = {name: index for index, name in enumerate(ORDER)}
    for file in sorted(RESULTS.glob("*.json"), key=lambda file: (place.get(name_in(file), len(place)), file.name)):
        found = published(file)
        question, _, text = cleandoc(import_module(f"benchmarks.{name_in(file)}").__doc__ or "").partition("\n\n")
        yield f"## {name_in(file).capitalize()}"
        yield f"**{question}**"
        yield text
        yield f"`{command_of(file)}` makes these tables. It ran:"
        yield "\n".join(f"- {line}" for line in summary(found))
        yield FIGURES.get(name_in(file), "")
        yield from tables(file, "### ")


def tables(file: Path, heading: str = "") -> Iterator[str]:
    """The tables of one file of results, or how to make them."""
    benchmark = import_module(f"benchmarks.{name_in(file)}").main.args[0]
    if not file.exists():
        yield f"There are no results yet. `{command_of(file)}` makes them."
        return
    for table in benchmark.tables(published(file)):
        yield f"{heading}{table.title}"
        yield table.markdown()
        yield table.remark


def command_of(file: Path) -> str:
    """The command that writes a file of results."""
    return f"python -m benchmarks.{name_in(file)} --full --json {file.relative_to(ROOT).as_posix()}"


def name_in(file: Path) -> str:
    """The benchmark that a file of results is of."""
    return file.name.partition("-")[0]


def source(name: str) -> Iterator[str]:
    """The source of a function. It is `py` and not `python`, since blocks of that run."""
    module, _, function = name.rpartition(".")
    yield f"```py\n{getsource(getattr(import_module(module), function))}```"


def part(name: str) -> Iterator[str]:
    """What stands in the part of this name."""
    listed = {"headline": headline, "modules": modules, "presets": presets, "commands": commands}
    listed |= {"benchmarks": benchmarks}
    if name in listed:
        return listed[name]()
    return tables(RESULTS / name) if name.endswith(".json") else source(name)


def filled(page: str) -> str:
    """The text of a page with its generated parts as they should be."""

    def fill(found: re.Match[str]) -> str:
        return "\n\n".join([f"{found[1]} -->", *filter(None, part(found[1]))]) + "\n\n"

    return PART.sub(fill, page)


def main() -> None:
    """Rewrites each page whose generated parts are stale, and none if a file of results must not be shown."""
    paths = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    try:
        pages = [filled(path.read_text()) for path in paths]
    except UsageError as error:
        sys.exit(f"docs/make.py: {error}")
    for path, page in zip(paths, pages):
        if page != path.read_text():
            write_whole(path, page.encode())
            print(f"{path.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
