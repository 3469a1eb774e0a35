"""Each benchmark in a short run: its counts are what theory says, and differing models end it without timings."""

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import methods, sample, score, slide, train
from benchmarks.tables import print_page
from wavenet_conv import from_tree, training
from wavenet_conv.names import read_names

BENCHMARKS = {"slide": slide, "score": score, "sample": sample, "train": train}
NAMES = read_names(Path(__file__).parents[2] / "names.txt")[::150] + ["abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The options of a short run; batches, contexts and trainings are small while this is in use."""
    path = tmp_path_factory.mktemp("lists") / "names.txt"
    path.write_text("\n".join(NAMES))
    with pytest.MonkeyPatch.context() as patch:
        batches = (methods.WINDOW_BATCHES, (64, 256)), (methods.NAME_BATCHES, (64,)), (sample.OUR_BATCHES, (64,))
        for tried, few in (*batches, (slide.WINDOW_TOKENS, (2**12,))):
            patch.setitem(tried, "cpu", few)
        patch.setattr(methods, "ARCHITECTURE", methods.ARCHITECTURE | {"n_embd": 4, "n_hidden": 8})
        patch.setattr(slide, "GROWTH_LAYERS", range(3, 8, 2))
        patch.setattr(sample, "GROWTH_LAYERS", range(3, 7))
        patch.setattr(sample, "COMPARED_NAMES", (8, 8))
        patch.setattr(score, "LONGEST_LIST", (70, 70))
        steps = {"LECTURE_STEPS": 40, "LECTURE_EVERY": 20, "OUR_EVERY": 2}
        for name, value in {"BATCHES": (8,), "QUICK_TARGET": 3.2, **steps}.items():
            patch.setattr(train, name, value)
        yield ["--names", str(path), "--device", "cpu"]


@pytest.fixture(scope="module")
def results(small, tmp_path_factory):
    """The results of each benchmark, which runs once."""
    made, folder = {}, tmp_path_factory.mktemp("results")

    def of(name):
        if name not in made:
            path = folder / f"{name}.json"
            assert BENCHMARKS[name].main([*small, "--json", str(path)]) == 0
            made[name] = json.loads(path.read_text())
        return made[name]

    return of


def by_method(rows):
    return {row["method"]: row for row in rows}


def spans_of(names):
    """All spans of 2, 4 and 8 tokens, by layer."""
    padded = ["." * 8 + name for name in names]
    return [[name[i : i + span] for name in padded for i in range(len(name) - span + 1)] for span in (2, 4, 8)]


def assert_spread(row, key):
    assert 0 < row[f"q1_{key}"] <= row[key] <= row[f"q3_{key}"]


def test_slide_counts_what_the_formulas_say(results):
    found = results("slide")
    assert found["equality"]["equal"] and found["equality"]["max_abs_diff"] < 1e-5
    one, whole = by_method(found["one_name"]), by_method(found["whole_list"])
    for method in ("loop", "windows", "windows_folded"):
        assert one[method]["nodes"] == [32, 16, 8] and sum(one[method]["nodes"]) == 7 * (len("analisa") + 1)
        assert [n / whole[method]["positions"] for n in whole[method]["nodes"]] == [4, 2, 1]
    for method in ("slid_conv1d", "slid"):
        assert one[method]["nodes"] == [14, 12, 8] and sum(one[method]["nodes"]) == 3 * len("analisa") + 13
        assert whole[method]["nodes"] == [len(layer) for layer in spans_of(NAMES[::5])]
    assert one["loop"]["launches"] > one["windows"]["launches"] > one["slid"]["launches"] > 0
    for row in found["one_name"]:
        assert_spread(row, "us")
    assert found["distinct_nodes"]["one_name"] == [8, 8, 8]
    assert found["distinct_nodes"]["whole_list"] == [len(set(layer)) for layer in spans_of(NAMES[::5])]
    work = (4 * 2 * 4 * 8 + 2 * 2 * 8 * 8 + 2 * 8 * 8) + 8 * 27
    assert whole["windows"]["multiply_adds_per_position"] == pytest.approx(work)


def test_growth_tends_to_the_theory(results):
    growth = results("slide")["growth"]
    assert [row["context"] for row in growth] == [8, 32, 128]
    for row in growth:
        context, (windows, slid), theory = row["context"], row["methods"], row["theory_node_ratio"]
        spans = [2**layer for layer in range(1, row["layers"] + 1)]
        assert slid["nodes"] == [slide.GROWTH_TOKENS + 1 - span for span in spans]
        assert windows["nodes"] == [context // span * windows["positions"] for span in spans]
        assert 0.75 * theory < row["node_ratio"] <= theory == (context - 1) / row["layers"]


def test_score_counts_distinct_nodes_and_their_multiply_adds(results):
    found, used = results("score"), NAMES[::10]
    assert list(found["equality"]["max_abs_diffs"]) == [*score.METHODS, "shared, default model"]
    rows, distinct = by_method(found["methods"]), [len(set(layer)) for layer in spans_of(used)]
    assert rows["slid"]["nodes"] == [len(layer) for layer in spans_of(used)] and found["distinct_nodes"] == distinct
    bigrams, fourgrams, windows = rows["shared"]["nodes"]  # nearly all distinct windows are not looked up
    halves = {tap: {window[4 * tap : 4 * tap + 4] for window in spans_of(used)[-1]} for tap in (0, 1)}
    compiled = importlib.util.find_spec("numba") is not None
    assert bigrams == 0 and fourgrams == (sum(map(len, halves.values())) if compiled else distinct[1])
    assert windows in (distinct[2], rows["shared"]["positions"])
    work = rows["shared"]["multiply_adds_per_position"] * rows["shared"]["positions"]
    assert work == pytest.approx(fourgrams * 8 * (1 if compiled else 2) * 8 + windows * 8 * 27)
    for row in rows.values():
        assert_spread(row, "positions_per_second")
    assert [row["names"] for row in found["sizes"]] == [1, 4, 16, 64]
    for row in found["sizes"]:
        for way in set(row) - {"names"}:
            assert_spread(row[way], "us")


def test_sample_measures_what_it_draws(results):
    found = results("sample")
    ways = [f"sample, batch {batch}, {dtype}" for batch in (1, 64) for dtype in ("float64", "float32")]
    assert found["equality"]["different_names"] == dict.fromkeys(ways, 0)
    drawn = {"loop": 40, "sample": 256}
    for row in found["methods"]:
        assert row["names"] == drawn.get(row["method"], row["batch"])
        assert_spread(row, "names_per_second")
    latency = by_method(found["latency"])
    assert latency["windows"]["launches"] > latency["windows_folded"]["launches"] > 0
    assert [row["context"] for row in found["growth"]] == [8, 64]
    for row, layers in zip(found["growth"], (3, 6)):
        assert row["nodes_per_character"] == {"windows": row["context"] - 1, "stream": layers}
        windows, _, stream = (part["us_per_character"] for part in row["one"])
        assert row["times_windows"] == windows / stream


def test_train_stops_at_the_target(results):
    found = results("train")
    assert found["equality"]["largest"] < 1e-10
    assert [row["method"] for row in found["throughput"]] == ["windows", "slid", "shared"]
    (row,) = found["trainings"]
    for part in (row["lecture"], row["ours"]):
        assert part["reached"] and part["curve"][-1] == [part["steps"], part["validation_loss"]]
        assert all(loss > 3.2 for _, loss in part["curve"][:-1])
    assert found["times_faster"] == row["lecture"]["seconds"] / row["ours"]["seconds"]


def test_train_counts_the_padding_of_whole_names(results):
    """A batch padded to its longest name has outputs behind the others' ends."""
    used = training.split_names(NAMES)[0][:8]
    windows, time = sum(map(len, used)) + 8, max(map(len, used)) + 8
    rows, multiply_adds = by_method(results("train")["throughput"]), (2 * 24 * 128, 2 * 128 * 128, 2 * 128 * 128)
    counts = {"windows": [4 * windows, 2 * windows, windows], "slid": [8 * (time + 1 - span) for span in (2, 4, 8)]}
    for method, nodes in counts.items():
        work = sum(count * each for count, each in zip(nodes, multiply_adds)) + nodes[-1] * 128 * 27
        assert (rows[method]["nodes"], rows[method]["multiply_adds"]) == (sum(nodes), work)
    assert rows["shared"]["nodes"] == sum(len(set(layer)) for layer in spans_of(used))


def test_train_profiles_last_and_names_the_operators(results):
    found = results("train")
    assert list(found)[-1] == "operators" and found["operators"]["names"] == 8
    everything, *rows = found["operators"]["rows"]
    assert everything["operator"] == "all operators"
    for method, product, calls in (("windows", "aten::mm", 12), ("slid", "aten::convolution_backward", 4)):
        costs = {row["operator"]: row[method] for row in rows if row[method]}
        assert costs[product]["calls"] == calls and len(costs) >= train.TOP
        for cost in costs.values():
            assert cost["share"] == pytest.approx(cost["ms"] / everything[method]["ms"])
        assert 0 < sum(cost["share"] for cost in costs.values()) < everything[method]["share"] == 1


def test_train_profiles_per_step(monkeypatch):
    events = [
        SimpleNamespace(key=key, self_cpu_time_total=us, count=n) for key, us, n in (("b", 1e3, 2), ("a", 3e3, 6))
    ]
    monkeypatch.setattr(train, "profile", lambda **_: nullcontext(SimpleNamespace(key_averages=lambda: events)))
    found = train.profiled(lambda: None, 2)
    assert list(found) == ["all operators", "a", "b"] and found["all operators"] == {"ms": 2, "share": 1, "calls": 4}
    assert found["a"] == {"ms": 1.5, "share": 0.75, "calls": 3}


def test_results_without_a_profile_are_shown(results, capsys):
    found = dict(results("train"))
    print_page(found, train.tables(found))
    assert "\nWhere a step's time goes, 8 names\n" in capsys.readouterr().out
    del found["operators"]
    print_page(found, train.tables(found))
    assert "Where a step's time goes" not in capsys.readouterr().out


def off_by_a_little(tree):
    conv = from_tree(tree)
    conv.layers[1].conv.weight.data[0, 0, 0] += 0.1
    return conv


def other_names(*args, **options):
    names = sample_names(*args, **options)
    return names if options["batch_size"] != 64 else [names[0] + "a", *names[1:]]


class NotANumber(methods.Stream):
    def step(self, tokens):
        return super().step(tokens) * torch.nan


sample_names, exact_loss = sample.sample, train.total_loss
BREAKS = [
    ("slide", methods, "from_tree", off_by_a_little),
    ("score", methods, "from_tree", off_by_a_little),
    ("sample", sample, "sample", other_names),
    ("sample", methods, "Stream", NotANumber),
    ("train", train, "total_loss", lambda *args: exact_loss(*args) * (1 + 1e-9)),
]


@pytest.mark.parametrize(("name", "module", "what", "broken"), BREAKS, ids=[f"{b[0]}-{b[2]}" for b in BREAKS])
def test_what_differs_ends_a_run_with_exit_code_1_and_no_timings(
    name, module, what, broken, small, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(module, what, broken)
    assert BENCHMARKS[name].main([*small, "--json", str(tmp_path / "out.json")]) == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["equality"]["equal"] and list(found)[-1] == "equality"
    printed = capsys.readouterr().out
    assert "NOT EQUAL" in printed and "|" not in printed


def test_without_the_peer_its_row_says_how_to_install_it(results, capsys):
    print_page(found := results("score") | {"peer": methods.MISSING}, score.tables(found))
    assert "| pytorch-tcn is not installed: pip install pytorch-tcn |" in capsys.readouterr().out
