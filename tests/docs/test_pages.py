"""Generated parts are fresh, every public name is in the API page, and every link leads somewhere."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import runpy

import pytest
from docs.pages import PAGES, broken_links
from helpers import ROOT

import reference
import wavenet_conv
from wavenet_conv import names, training
from wavenet_conv.cli import COMMANDS

MAKE = runpy.run_path(str(ROOT / "docs" / "make.py"))
RUNS = ("slide", "choosing", "ladder")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_generated_parts_are_fresh(path):
    page = path.read_text()
    assert MAKE["filled"](page) == page, f"{path.name} is stale: run `python docs/make.py`"


def test_a_stale_part_is_written_anew_and_the_rest_stays():
    page = (
        "a\n<!-- generated: slide-cpu.json -->\nold\n<!-- end -->\nb\n<!-- generated: commands -->\n<!-- end -->\nc\n"
    )
    filled = MAKE["filled"](page)
    assert filled.startswith("a\n<!-- generated: slide-cpu.json -->\n\nOne name") and "\nold\n" not in filled
    assert "\n<!-- end -->\nb\n" in filled and filled.endswith("\n\n<!-- end -->\nc\n")
    assert MAKE["filled"](filled) == filled


def test_results_that_are_missing_are_said_to_be():
    page = "<!-- generated: slide-{}.json -->\n<!-- end -->\n"
    assert "no results yet. `python -m benchmarks.slide --full --json " in MAKE["filled"](page.format("none"))
    with pytest.raises(ModuleNotFoundError):
        MAKE["filled"](page.format("cpu").replace("slide", "slid"))


def test_every_result_and_every_command_is_on_its_page():
    benchmarks, commands = ((ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "command-line.md"))
    for file in RESULTS:
        assert f"\n## {file.name.partition('-')[0].capitalize()}\n" in benchmarks
        assert f"--json benchmarks/results/{file.name}`" in benchmarks
    assert benchmarks.count("\n|") > 10 * len(RESULTS)
    for name in COMMANDS:
        assert f"\n## wavenet-conv {name.replace('_', '-')}\n" in commands


def test_options_are_listed_with_their_values():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", metavar="FILE", nargs="?", help="- is <input>")
    parser.add_argument("-o", "--out", required=True, help="use it after --sort N")
    parser.add_argument("--kind", choices=("a", "b"))
    parser.add_argument("--flag", action="store_true", help="a flag")
    assert next(MAKE["options"](parser)).splitlines()[2:] == [
        "| `FILE` | - is <input> |",
        "| `-o, --out OUT` | use it after `--sort N` (required) |",
        "| `--kind {a,b}` |  |",
        "| `--flag` | a flag |",
    ]


@pytest.mark.parametrize(
    "module, public",
    [
        (wavenet_conv, set(wavenet_conv.__all__) - {"__version__"}),
        (training, None),
        (names, {name for name, value in vars(names).items() if inspect.isfunction(value) and name[0] != "_"}),
        (reference, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_public_name_is_in_the_api_page(module, public):
    if public is None:
        public = {name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}
    listed = re.findall(rf"^::: {module.__name__}\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert public and sorted(public - set(listed)) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    assert broken_links(path, path.read_text()) == []


def test_broken_links_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A heading: `code`, 2·2\n\n```sh\n# no heading\n```\n")
    good = (
        "[a](other.md) [b](other.md#a-heading-code-22) ![c](other.md) [d](#this) [e](https://example.org)\n\n## This\n"
    )
    bad = ["missing.md", "other.md#no-heading", "#that", "picture.svg"]
    page.touch()
    assert broken_links(page, good) == []
    assert broken_links(page, good + "".join(f"[x]({link})\n" for link in bad)) == bad


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build", reason="needs MkDocs: pip install '.[docs]'")
    from mkdocs.config import load_config

    build.build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    assert (tmp_path / "page.html").stat().st_size > 1000
    for page in tmp_path.glob("*.html"):
        foreign = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*", page.read_text())
        assert not foreign, "no part of a page comes from elsewhere"


def test_the_figures_are_fresh():
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    for name, draw in figures["FIGURES"].items():
        drawn = (ROOT / "docs" / "figures" / name).read_text()
        assert drawn == draw(), f"docs/figures/{name} is stale: run `python docs/figures.py`"


def results_of(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}-cpu.json").read_text())


def test_what_the_readme_says_is_in_the_runs():
    readme, slide, choosing, ladder = (ROOT / "README.md").read_text(), *map(results_of, RUNS)
    (lecture,) = (row for row in ladder["rungs"] if row["rung"] == "wide")
    rows = {row["method"]: row for row in choosing["methods"] if row.get("threads") == 1}
    ngrams, default = rows["Kneser-Ney 6, KenLM"], rows["default"]
    losses = [f"{row['validation_loss']:.3f}" for row in (ngrams, lecture, default)]
    assert f"validation names is {losses[0]} nats per character. The lecture's network has {losses[1]};" in readme
    assert f"the same network trained by this library, has {losses[2]}." in readme
    loss = {row["rung"]: f"{row['validation_loss']:.3f}" for row in ladder["rungs"]}
    assert (
        f"an LSTM of `torch.nn` with as many parameters has {loss['lstm-76k']}, after a minute of training; "
        f"one three times as large has {loss['lstm-230k']}." in readme
    )
    assert 30 < {row["rung"]: row["seconds"] for row in ladder["rungs"]}["lstm-76k"] < 90
    assert (
        f"`fast` ({loss['ours-fast']}), `wide` (the default model) and `gated` ({loss['ours-gated']}), which" in readme
    )
    assert loss["ours-wide"] == losses[2]
    us = {row["method"]: row["us"] for row in slide["one_name"]}
    assert f"For one name the lecture's loop takes {us['loop'] / us['slid']:.0f} times as long" in readme


def test_what_the_benchmarks_say_of_training_is_in_their_runs():
    ways = {row["way"]: row for row in results_of("exactness")["ways"]}
    for part in ("train_loss", "validation_loss", "test_loss"):
        medians = [row[part] for row in ways.values()]
        seeds = max(row[f"highest_{part}"] - row[f"lowest_{part}"] for row in ways.values())
        assert max(medians) - min(medians) < min(0.005, 1.2 * seeds)
    assert ways["multiplicities"]["seconds"] / ways["shared"]["seconds"] == pytest.approx(3, abs=0.3)
    windows, slid = (
        row for row in results_of("train")["throughput"] if row["names"] == 1024 and row["method"] != "shared"
    )
    assert 1 < slid["times_windows"] < 1.2 and slid["multiply_adds"] / windows["multiply_adds"] == pytest.approx(
        4 / 3, abs=0.1
    )
    ms = {row["operator"]: row for row in results_of("train")["operators"]["rows"]}
    convolutions = ms["aten::convolution_backward"]["slid"]["ms"] + ms["aten::mkldnn_convolution"]["slid"]["ms"]
    assert convolutions == pytest.approx(ms["aten::mm"]["windows"]["ms"], rel=0.2)
    assert ms["aten::sum"]["slid"]["ms"] == pytest.approx(ms["aten::var"]["windows"]["ms"], rel=0.2)


def test_what_the_pages_say_of_lists_of_any_size_is_in_the_run():
    readme, choosing = ((ROOT / name).read_text() for name in ("README.md", "docs/choosing.md"))
    rows = {row.pop("names"): {name: cell["us"] for name, cell in row.items()} for row in results_of("score")["sizes"]}
    one, million = rows[1], rows[1_000_000]
    assert f"one name takes the loop {one['loop']:.0f} µs and `Scorer` {one['shared']:.0f} µs;" in readme
    assert f"in a list of a million, a name takes `Scorer` {million['shared']:.2f} µs." in readme
    ratios = {names: row["shared"] / row["Kneser-Ney 6, KenLM"] for names, row in rows.items()}
    assert f"KenLM scores one name {ratios[1]:.0f} times as fast as the default model" in readme
    assert "and a list of 8,192 names about as fast" in readme and 0.8 < ratios[8192] < 1.25
    assert f"a million names {1 / ratios[1_000_000]:.1f} times as fast as KenLM" in readme
    assert "in lists of some ten thousand names or more" in choosing and ratios[131_072] < 0.8
