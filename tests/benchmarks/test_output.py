"""Files of results: written section by section, refused where figures are not measurements; and what they say."""

import json
import os
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from benchmarks import harness, machine, output
from benchmarks.harness import Benchmark
from benchmarks.tables import Table
from wavenet_conv.errors import UsageError

UNREAL = "Pretend CUDA device (no GPU)"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FIRST = {"equality": {"equal": True}, "rows": []}


def fake(*sections):
    def run(session):
        for section in sections:
            if isinstance(section, BaseException):
                raise section
            yield section

    return Benchmark("fake", "What?\n", run, lambda results: [Table("Times", "method", results["rows"])])


def test_a_section_is_in_the_file_before_the_next_one_begins(tmp_path):
    path, seen = tmp_path / "out.json", []

    def run(session):
        yield FIRST
        seen.append(json.loads(path.read_text()))
        yield {"rows": [{"method": "loop"}]}

    benchmark = Benchmark("fake", "What?\n", run, lambda results: [])
    assert harness.main(benchmark, ["--json", str(path), "--device", "cpu"]) == 0
    found = json.loads(path.read_text())
    assert seen[0]["finished"] is False and seen[0]["rows"] == []
    assert found["finished"] is True and found["rows"] == [{"method": "loop"}]


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("no"), 2), (KeyboardInterrupt(), 130), (RuntimeError("CUDA"), None)]
)
def test_a_run_that_fails_keeps_its_sections_and_says_that_it_did_not_finish(error, code, tmp_path):
    path = tmp_path / "out.json"
    path.write_text("of an older run")
    arguments = ["--json", str(path), "--device", "cpu"]
    if code is not None:
        assert harness.main(fake(FIRST, error), arguments) == code
    else:
        with pytest.raises(RuntimeError):
            harness.main(fake(FIRST, error), arguments)
    assert json.loads(path.read_text())["finished"] is False
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(UsageError, match="did not finish"):
        output.published(path)


def must_not_run():
    raise AssertionError("the run has begun")


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to(os.devnull)], ids=["pipe", "link to a device"]
)
def test_what_is_no_regular_file_is_not_replaced(make, tmp_path, capsys):
    make(path := tmp_path / "out.json")
    before = path.lstat()
    assert harness.main(fake(AssertionError("it has begun")), ["--json", str(path), "--device", "cpu"]) == 2
    assert "is no regular file" in capsys.readouterr().err
    assert path.lstat() == before and Path(os.devnull).is_char_device()


def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    assert harness.main(fake(FIRST), ["--json", str(tmp_path / "link.json"), "--device", "cpu"]) == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "file.json").read_text())["finished"]


@pytest.mark.parametrize("name", ["slide.py", "results", "link.json", ".json", ""])
def test_only_files_that_end_in_json_are_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in (Path("slide.py"), Path("results")):
        path.write_text("a source file")
    Path("link.json").symlink_to("slide.py")
    assert harness.main(fake(AssertionError("it has begun")), ["--json", name, "--device", "cpu"]) == 2
    assert f"--json {name or repr(name)}: name a file that ends in .json, such as" in capsys.readouterr().err
    assert Path("slide.py").read_text() == Path("results").read_text() == "a source file"


@pytest.mark.parametrize("place", ["folder", "folder/deep", "link", "file link"])
def test_a_device_that_is_not_real_writes_nothing_that_is_published(place, tmp_path, monkeypatch, capsys):
    folder, path = tmp_path / "results", tmp_path / "results" / "slide-cuda.json"
    (folder / "deep").mkdir(parents=True)
    if place == "folder/deep":
        path = folder / "deep" / "slide-cuda.json"
    elif place == "link":
        (tmp_path / "link").symlink_to(folder)
        path = tmp_path / "link" / "slide-cuda.json"
    elif place == "file link":
        (tmp_path / "other.json").symlink_to(path)
        path = tmp_path / "other.json"
    monkeypatch.setattr(output, "RESULTS", folder)
    monkeypatch.setattr(machine, "machine", lambda device: UNREAL)
    begun = AssertionError("it has begun")
    assert harness.main(fake(begun), ["--json", str(path), "--device", "cpu"]) == 2
    assert "is a device that is not real" in capsys.readouterr().err
    assert not list(folder.rglob("*.json"))
    assert harness.main(fake(FIRST), ["--json", str(tmp_path / "elsewhere.json"), "--device", "cpu"]) == 0
    with pytest.raises(UsageError, match="not real"):
        output.published(tmp_path / "elsewhere.json")


@pytest.mark.parametrize("changes", [{"device": UNREAL}, {"finished": False}], ids=str)
def test_the_docs_refuse_figures_that_are_no_measurements(changes, tmp_path, monkeypatch):
    for file in RESULTS:
        (tmp_path / file.name).write_text(json.dumps(json.loads(file.read_text()) | changes))
    for script, drawers in (("make.py", ("headline", "benchmarks")), ("figures.py", ("growth_figure", "sizes_figure"))):
        monkeypatch.setattr(output, "RESULTS", tmp_path)
        module = runpy.run_path(str(ROOT / "docs" / script))
        for drawer in drawers:
            with pytest.raises(UsageError, match=r"not real|did not finish"):
                print(*module[drawer]())
        with pytest.raises(SystemExit, match=r"not real|did not finish"):
            module["main"]()


def test_committed_files_can_be_shown():
    assert len(RESULTS) >= 6
    for file in RESULTS:
        assert output.published(file)["device"]


def answering(printed):
    def run(command, **options):
        if isinstance(printed, Exception):
            raise printed
        assert command[0] == "nvidia-smi" and command[-1] == "--id=GPU-12-34"
        return SimpleNamespace(stdout=printed)

    return run


@pytest.mark.parametrize(
    ("printed", "values"),
    [
        ("570.86.15, 1980, 2619, 700.00, 31\n", ["570.86.15", 1980, 2619, 700, 31]),
        ("570.86.15, 1980, [N/A], [Not Supported], 31\n", ["570.86.15", 1980, None, None, 31]),
        ("No devices were found\n", [None] * 5),
        (FileNotFoundError("nvidia-smi"), [None] * 5),
        (subprocess.TimeoutExpired("nvidia-smi", 20), [None] * 5),
    ],
)
def test_clocks_are_those_that_are_found(printed, values, monkeypatch):
    monkeypatch.setattr(subprocess, "run", answering(printed))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    found = machine.gpu(torch.device("cuda"))
    assert list(found) == ["driver", "sm_clock", "memory_clock", "power_limit", "temperature"]
    assert list(found.values()) == values


def test_the_triton_kernels_that_run_are_named(monkeypatch):
    triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **options: args)
    kernel = triton.JITFunction(must_not_run)
    with machine.triton_kernels() as ran:
        assert not ran and kernel.run(1, grid=(1,)) == (1,)
    assert ran == {"must_not_run"}


def test_versions_are_in_every_file(tmp_path, device):
    path = tmp_path / "out.json"
    assert harness.main(fake(FIRST), ["--json", str(path), "--device", device.type]) == 0
    found = json.loads(path.read_text())
    assert (found["torch"], found["cuda"]) == (torch.__version__, torch.version.cuda)
    assert found["triton"] == machine.installed("triton") and machine.installed("no-such-package") is None
    assert ("gpu" in found, "triton_kernels" in found) == (device.type == "cuda",) * 2
