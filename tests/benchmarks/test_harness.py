"""The harness: exit codes, JSON, tables, timing; and counts against counts by hand."""

import json
from argparse import Namespace
from functools import partial

import pytest
import torch
from helpers import ALPHABET
from rich.progress import Progress

import reference
from benchmarks import counting, harness
from benchmarks.harness import Benchmark
from benchmarks.tables import Table, print_page
from wavenet_conv import Vocabulary, WaveNetConfig, WaveNetConvError, fold_batch_norm, from_tree
from wavenet_conv.counts import count_nodes

CPU = torch.device("cpu")
RESULTS = {"equality": {"equal": True, "tolerance": 1e-5}, "rows": [{"method": "loop", "us": 2.0}]}


def fake(results=RESULTS):
    def run(session):
        if isinstance(results, BaseException):
            raise results
        session.ticks("measured", 1)()
        yield results

    return Benchmark("fake", "What?\n", run, lambda results: [Table("Times", "method; us=us .1f", results["rows"])])


def test_tables_go_to_stdout_and_progress_to_stderr(tmp_path, capsys):
    (tmp_path / "out.json").write_text("what was there")
    assert harness.main(fake(), ["--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr()
    assert "Equal: tolerance 1e-05." in printed.out and "| loop   | 2.0 |" in printed.out
    assert "measured" in printed.err and "measured" not in printed.out
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == RESULTS["rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("results", "code"),
    [({"equality": {"equal": False}}, 1), (WaveNetConvError("it broke"), 1), (KeyboardInterrupt(), 130)],
)
def test_the_exit_code_says_how_a_run_ended(results, code, capsys):
    assert harness.main(fake(results), []) == code
    printed = capsys.readouterr()
    assert "|" not in printed.out and ("NOT EQUAL" in printed.out) == isinstance(results, dict)
    assert ("benchmarks.fake: it broke\n" in printed.err) == isinstance(results, WaveNetConvError)
    assert ("benchmarks.fake: interrupted\n" in printed.err) == isinstance(results, KeyboardInterrupt)


def test_a_caveat_stands_in_place_of_a_verdict(capsys):
    assert harness.main(fake(RESULTS | {"equality": {"equal": False}, "caveat": "A short run."}), []) == 0
    printed = capsys.readouterr().out
    assert "\nA short run.\n" in printed and "qual" not in printed.lower() and "| loop   | 2.0 |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "missing.txt"], "benchmarks.fake: missing.txt: No such file"),
        (["--seed", "-1"], "--seed: '-1' is not an integer from 1"),
        (["--seed", str(2**63)], "is not an integer from 1 to 2**63 - 1"),
        (["--json", "no/such/folder/out.json"], "benchmarks.fake: --json no/such/folder/out.json: cannot write there"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cuda"], "--device cuda: this PyTorch sees no CUDA device"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = harness.main(fake(), arguments)
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert code == 2 and not printed.out and message in printed.err
    assert printed.err.startswith("usage") or printed.err.count("\n") == 1


def test_a_table_prints_what_the_rows_hold_and_a_dash_for_what_they_do_not(capsys):
    rows = [
        {"method": "loop", "us": 9.0, "q1_us": 8.0, "q3_us": 10.0, "nodes": [4000, 2], "of": [{"rate": 5}]},
        {"method": "slid", "us": 3.0, "q1_us": 2.0, "q3_us": 4.0},
        {"method": "peer"},
    ]
    columns = "method; time=us .1f; quartiles=~us .0f; x loop=us/loop .2f; nodes=nodes ,; rate=of.0.rate; none=share"
    head = {"device": "d", "torch": "t", "dtype": "f", "equality": {"equal": True}}
    print_page(head, [Table("T", columns, rows, "R")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["method", "time", "quartiles", "x loop", "nodes", "rate"]
    assert cells[2] == ["loop", "9.0", "8 to 10", "1.00", "4,000 2", "5"]
    assert cells[3] == ["slid", "3.0", "2 to 4", "3.00", "-", "-"]
    assert cells[4] == ["peer", "-", "-", "-", "-", "-"]


def quiet_session(device=CPU):
    return harness.Session(Namespace(full=False), device, [], None, Progress(disable=True))


def test_a_method_is_timed_at_its_best_batch():
    def call(size):
        calls.append(size)
        sum(range(10**5))
        return size

    calls, session = [], quiet_session()
    config = WaveNetConfig(vocab_size=5, n_embd=4, n_hidden=6, kernel_sizes=(2,))
    (row,) = harness.rows_at_best({"one": harness.Sized(call, (1, 50, 99))}, "name", config, 3, "title", session)
    assert calls == [1, 1, 50, 50, 50, 50, 50] and row["batch"] == row["names"] == 50 and row["calls"] == 3
    assert row["us_per_name"] == pytest.approx(row["us"] / 50) == pytest.approx(1e6 / row["names_per_second"])


def test_methods_take_turns_in_blocks():
    order = []
    methods = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = harness.time_calls(methods, 3, CPU, block=2, tick=lambda: order.append("."))
    assert "".join(order) == "aabb.aabb." and [len(times) for times in samples.values()] == [4, 4]
    assert harness.spread("us", [1, 2, 3, 4, 5]) == {"us": 3, "q1_us": 2, "q3_us": 4}
    assert harness.spread("us", [7]) == {"us": 7, "q1_us": 7, "q3_us": 7}


def test_everything_is_timed_before_anything_is_profiled(monkeypatch):
    """Also what is called later, with gradients if it has been timed with them; what nobody sees is None."""
    events, grads = [], []

    def counted(call, device):
        grads.append(torch.is_grad_enabled())
        events.append("profile")
        return call()

    def run(session):
        for index in range(2):
            with torch.set_grad_enabled(index == 1):
                rows = harness.call_rows(methods, 1, "title", session, block=1, unprofiled=["hidden"])
            assert [row["launches"] for row in rows] == [None, None]
            yield {f"rows{index}": rows}

    methods = {"seen": lambda: events.append("seen") or 3, "hidden": lambda: events.append("hidden")}
    monkeypatch.setattr(harness, "count_launches", counted)
    *_, results = harness.growing(Benchmark("fake", "What?", run, list), quiet_session(), {})
    assert events == ["seen", "hidden"] * 4 + ["profile", "seen"] * 2 and grads == [False, True]
    assert [[row["launches"] for row in results[f"rows{index}"]] for index in range(2)] == [[3, None]] * 2


def test_launches_that_the_profiler_cannot_see_are_none(device):
    assert harness.count_launches(lambda: None, device) is None
    if device.type == "cpu":  # on CUDA what is seen depends on the driver
        assert harness.count_launches(lambda: torch.ones(2) + 1, device) == 2


def test_what_ends_on_the_host_is_timed_by_the_hosts_clock(device, monkeypatch):
    """On CUDA each call waits for the device on both sides; events would leave out what the host does after it."""
    waits, clock = [], iter(range(100))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    found = harness.time_calls({"a": lambda: None}, 4, device, block=2, by_host=True)
    assert found == {"a": [1e6] * 4} and len(waits) == (8 if device.type == "cuda" else 0)


@pytest.mark.parametrize("gated", [False, True])
def test_nodes_are_counted_and_not_computed_from_a_formula(gated):
    conv = from_tree(reference.build((3, 2), n_embd=4, n_hidden=(5, 6), gated=gated).eval())
    folded, tree, tokens = fold_batch_norm(conv), reference.from_conv(conv), torch.randint(27, (2, 10))
    with torch.no_grad():
        for call, nodes in (
            (lambda: conv(tokens), [16, 10]),
            (lambda: folded(tokens), [16, 10]),
            (lambda: reference.window_logits(tree, tokens), [20, 10]),
            (lambda: reference.loop_logits(tree, tokens[:1]), [10, 5]),
            (lambda: None, [0, 0]),
        ):
            assert counting.nodes_of(call, conv.config) == nodes
    with torch.no_grad(), counting.counting(conv.config) as counted:
        folded(tokens)
    if gated:  # convolution and residual of every node, skips and head of every output
        work = 16 * (3 * 4 * 10 + 5 * 4) + 10 * (2 * 4 * 12) + 10 * (5 * 4 + 6 * 4 + 4 * 4 + 4 * 27)
    else:
        work = 16 * 3 * 4 * 5 + 10 * 2 * 5 * 6 + 10 * 6 * 27
    assert counted.multiply_adds == work


def test_multiply_adds_of_products_and_convolutions_are_counted():
    config = WaveNetConfig(vocab_size=5, n_embd=4, n_hidden=(6, 7), kernel_sizes=(3, 2))
    with counting.counting(config) as counted:
        torch.addmm(torch.ones(5), torch.ones(2, 3), torch.ones(3, 5)) @ torch.ones(5, 7)
        torch.nn.functional.conv1d(torch.ones(1, 3, 9), torch.ones(4, 3, 2))
    assert counted.multiply_adds == 2 * 3 * 5 + 2 * 5 * 7 + 4 * 8 * 3 * 2
    assert counting.shared_multiply_adds(config, [10, 20]) == 10 * 2 * 6 * 7 + 20 * 7 * 5


@pytest.mark.parametrize("sizes", [{"kernel_sizes": (3, 2)}, {"kernel_sizes": (2, 2), "head_kernel_size": 2}], ids=str)
def test_counted_nodes_are_those_that_models_compute(sizes):
    tree = reference.build(n_embd=4, n_hidden=(5, 6), norm="none", **sizes).eval()
    conv, vocab, names = from_tree(tree), Vocabulary(ALPHABET), ["emma", "", "isabellaisabella"]
    expected = count_nodes(names, conv.config)
    loop, convolution = [], []
    with torch.no_grad():
        for name in names:
            tokens, _ = vocab.encode([name], context=conv.context)
            loop.append(counting.nodes_of(partial(reference.loop_logits, tree, tokens), conv.config))
            convolution.append(counting.nodes_of(partial(conv, tokens), conv.config))
    assert expected.loop == tuple(map(sum, zip(*loop))) and expected.convolution == tuple(map(sum, zip(*convolution)))
