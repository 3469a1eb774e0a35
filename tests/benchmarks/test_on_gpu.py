"""The one call for a machine with a GPU, with Python replaced by what passes, fails and hangs."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from benchmarks import on_gpu

RESULTS = {name: json.loads((ROOT / f"benchmarks/results/{name}-cpu.json").read_text()) for name in on_gpu.BENCHMARKS}
STEPS = ("tests", "kernel", *on_gpu.BENCHMARKS)
PYTHON = """
import json, os, runpy, sys, time
plan, (_, _, module, *arguments) = json.load(open(os.environ["PLAN"])), sys.argv
name = module.removeprefix("benchmarks.")
if module == "benchmarks.on_gpu" and arguments != ["check"]:
    sys.argv = sys.argv[2:]
    sys.path[0] = os.getcwd()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
print(module, *arguments)
if module == "pytest":
    name = "kernel" if "test_kernel" in arguments else "tests"
doing = plan.get(name, {})
if "results" in doing:
    open(arguments[arguments.index("--json") + 1], "w").write(json.dumps(doing["results"]))
if "sleep" in doing:
    open(os.environ["PLAN"] + ".pid", "w").write(str(os.getpid()))
    time.sleep(doing["sleep"])
sys.exit(doing.get("code", 0))
"""


@pytest.fixture
def call(tmp_path):
    """Runs the script with a plan of what its steps do; returns the process and the files."""
    (tmp_path / "python.py").write_text(PYTHON)

    def run(plan, **environment):
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        environment |= {"PLAN": str(tmp_path / "plan.json"), "PYTHON": f"{sys.executable} {tmp_path / 'python.py'}"}
        command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), "out"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
        return done, {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}

    return run


def exit_codes(summary):
    steps = summary.partition("| question |")[0].splitlines()
    cells = [line.strip("| ").split(" | ") for line in steps if line.startswith("|")]
    return {name: int(code) for name, code, *_ in cells[2:]}


def questions():
    """The questions in the table of docs/gpu.md."""
    rows = (ROOT / "docs" / "gpu.md").read_text().partition("| question |")[2].split("\n\n")[0].splitlines()[2:]
    return [row.split(" | ")[0].removeprefix("| ") for row in rows]


def figures(summary):
    rows = (line.removeprefix("| ").split(" | ") for line in summary.partition("| question |")[2].splitlines()[2:])
    return {question: figure.removesuffix(" |") for question, figure in rows}


def test_every_step_runs_and_the_summary_has_the_headlines(call):
    plan = {name: {"results": RESULTS[name] | {"finished": True}} for name in on_gpu.BENCHMARKS}
    slide, sample, rates = plan["slide"]["results"], plan["sample"]["results"], (1e9, 2e8, 5e8)
    slide["triton_kernels"] = ["a_kernel"]
    slide["one_name"] = [*slide["one_name"], {"method": "slid_graph", "us": slide["one_name"][0]["us"] / 50}]
    sample["latency"] = [{"method": "stream", "us": 9.0}, {"method": "stream_graph", "us": 3.0}]
    ways = ("in the device", "from a list of strings", "from an Arrow column")
    rows = [{"method": way, "positions_per_second": rate} for way, rate in zip(ways, rates)]
    plan["score"]["results"]["on_device"] = {"rows": rows}
    done, files = call(plan)
    assert done.returncode == 0 and not done.stderr
    assert set(files) == {"log.txt", "summary.txt", *(f"{name}.json" for name in on_gpu.BENCHMARKS)}
    summary = files["summary.txt"]
    assert exit_codes(summary) == dict.fromkeys(STEPS, 0)
    assert "benchmarks.on_gpu check\n" in summary and "Triton kernels that ran: a_kernel" in summary
    found, us = figures(summary), {row["method"]: row["us"] for row in slide["one_name"]}
    assert [*found][:10] == questions() and len(found) == 12
    short, long = (f"{slide['growth'][place]['time_ratio']:.2f} times: " for place in (0, -1))
    starts = (f"{us['windows_folded'] / us['slid']:.2f} times: ", f"{us['windows'] / us['slid_graph']:.2f} times: ")
    starts += ("50.00 times: ", short, long, "1.000 billion", "0.200 billion", "0.500 billion")
    starts += (f"{RESULTS['train']['throughput'][2]['times_windows']:.2f} times: ", "3.00 times: 3.0 us against 9.0")
    starts += ("", f"{RESULTS['train']['times_faster']:.1f} times")
    assert [figure[: len(start)] for figure, start in zip(found.values(), starts)] == [*starts]
    for name in on_gpu.BENCHMARKS:
        assert f"\nbenchmarks.{name} --device cuda {'' if name == 'train' else '--full '}--json /" in files["log.txt"]
    assert "tests -k cuda\n" in files["log.txt"]


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(call):
    unreal = {"device": "Pretend", "finished": False, "equality": {"equal": True}}
    unreal |= {"one_name": RESULTS["slide"]["one_name"], "growth": []}  # without slid_graph
    plan = {"tests": {"code": 1}, "slide": {"code": 3, "results": unreal}, "sample": {"sleep": 60}}
    plan["score"] = {"code": 1, "results": RESULTS["score"] | {"finished": False}}
    done, files = call(plan, OPTIONS="", LIMIT_SAMPLE="1", TRAIN_OPTIONS="--seed 3")
    assert done.returncode == 1 and len(files) <= 8
    assert exit_codes(files["summary.txt"]) == dict(zip(STEPS, (1, 0, 3, 1, 124, 0)))
    summary = files["summary.txt"]
    assert "sample: no results" in summary and "score: NOT FINISHED, equal" in summary
    assert figures(summary)["positions/s, from an Arrow column"] == "not measured"
    assert figures(summary)["one name: `slid_graph` against `loop`"] == "not measured"
    assert figures(summary)["growth: `slid` against `windows` at context 1,024"] == "not measured"
    assert "slide: NOT FINISHED, equal, Triton kernels that ran: none; NO MEASUREMENTS" in summary
    assert "--device cuda --json" in files["log.txt"] and "--device cuda --seed 3 --json" in files["log.txt"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_step_that_runs_and_those_after_it(call, tmp_path, number, code):
    plan = {"kernel": {"sleep": 60}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    environment = {"PLAN": str(tmp_path / "plan.json"), "PYTHON": f"{sys.executable} {tmp_path / 'python.py'}"}
    command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), str(tmp_path / "out")]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("kernel: "))
        pid = tmp_path / "plan.json.pid"
        while not (pid.exists() and pid.read_text()):
            os.sched_yield()
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == code and "slide" not in rest
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("out", ["-", "--help", "", "/dev/null", "a/b"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, out):
    (tmp_path / "a").touch()
    script = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), out]
    done = subprocess.run(script, cwd=tmp_path, env=os.environ | {"CDPATH": "/"}, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_nothing_runs_where_something_is_missing(call, tmp_path):
    done, files = call({"on_gpu": {"code": 2}})
    assert done.returncode == 2 and list(files) == ["summary.txt"]
    script = ["/bin/bash", str(ROOT / "benchmarks" / "on_gpu.sh")]
    assert subprocess.run(script, capture_output=True).returncode == 2
    done = subprocess.run([*script, "out"], cwd=tmp_path, env=os.environ | {"PYTHON": "no-python"}, capture_output=True)
    assert done.returncode == 2 and b"no-python is missing" in done.stderr


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "REQUIRED", ("torch", "no_such_module", "none_either"))
    assert on_gpu.main(["check"]) == 2
    assert "missing here: no_such_module, none_either;" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main(["check"]) == 2
    assert "sees no CUDA device here" in capsys.readouterr().out


def test_versions_and_clocks_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    monkeypatch.setenv("COMMIT", "abcdef")
    monkeypatch.setattr(on_gpu, "OPTIONAL", ("no_such_module",))
    assert on_gpu.main(["check"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A GPU\n") and f"PyTorch {torch.__version__}, " in printed
    assert "commit abcdef\n" in printed and "sm clock" in printed and "without no_such_module\n" in printed


def test_the_commit_is_unknown_without_git(monkeypatch, tmp_path):
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert on_gpu.commit() == "unknown"


def test_modules_are_looked_up():
    assert on_gpu.main(["has", "pytest"]) == 0 and on_gpu.main(["has", "no_such_module"]) == 1
    assert on_gpu.main([]) == 2
