"""`wavenet-conv sweep`: the same trials from the same seed, resumed, killed and shared; the best one's own bits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers import ROOT

from wavenet_conv import load_checkpoint
from wavenet_conv.cli import sweep as command
from wavenet_conv.cli.space import Space
from wavenet_conv.names import read_names
from wavenet_conv.training import Corpus, evaluate, split_names

optuna = pytest.importorskip("optuna", reason="needs Optuna: pip install optuna")
sqlalchemy = pytest.importorskip("sqlalchemy")

SMALL = """\
steps = 6
eval_every = 2
n_embd = 2
n_hidden = 4
lr = {low = 1e-3, high = 0.3, log = true}
batch_size = {low = 8, high = 64}
kernel_sizes = {choices = [[2, 2], [3], [1, 2, 1]]}
"""


@pytest.fixture
def folder(names, tmp_path, monkeypatch):
    """The working directory: a list, a space, and the storage to come."""
    (tmp_path / "list.txt").write_text("\n".join(names[:200]))
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def unsynced():
    """SQLite does not wait for the disk, which takes longer than everything else here."""

    def connected(connection, _):
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", connected)


@pytest.fixture
def sweep(folder, run):
    def call(*arguments, space="small.toml"):
        code, printed, err = run("sweep", space, "list.txt", "--device", "cpu", *arguments)
        return code, printed.decode(), err

    return call


@pytest.fixture
def start(folder):
    """Starts a sweep in a process that does not outlive the test."""
    running = []

    def process(*arguments):
        call = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{MAIN}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(
            subprocess.Popen([*call, "sweep", "small.toml", "list.txt", "--device", "cpu", *arguments], **pipes)
        )
        return running[-1]

    yield process
    for one in running:
        one.kill()
        one.communicate()


MAIN = "from wavenet_conv.cli import main; sys.exit(main())"


def rows(out):
    """The trials by number, without what differs from run to run."""
    trials = sorted(json.loads(out)["trials"], key=lambda trial: trial["trial"])
    return [{name: value for name, value in trial.items() if name != "seconds"} for trial in trials]


def states(folder, name="sweep"):
    trials = optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/sweep.db").trials
    return [trial.state.name for trial in trials]


def test_the_same_seed_draws_the_same_trials_also_where_it_is_resumed(sweep):
    """Twelve trials: ten that are drawn evenly, and two that depend on the earlier ones."""
    code, out, err = sweep("--trials", 12, "--json")
    assert code == 0 and err.count(" of 12 trials, best ") == 12
    whole = rows(out)
    assert len({json.dumps(row["settings"]) for row in whole}) == 12
    assert {row["state"] for row in whole} == {"ended", "stopped early"}
    for trials in (5, 12):
        code, out, _ = sweep("--trials", trials, "--study", "parts", "--json")
        assert (code, len(rows(out))) == (0, trials)
    assert rows(out) == whole
    code, out, err = sweep("--trials", 3, "--json")
    assert (code, err) == (0, "") and rows(out) == whole
    steps, losses = zip(*whole[0]["curves"]["validation"])
    assert steps == (2, 4, 6) and min(losses) == whole[0]["validation_loss"]
    steps, losses = zip(*whole[0]["curves"]["train"])
    assert steps == (2, 4, 6) and all(1 < loss < 5 for loss in losses)


def test_the_best_trial_is_written_with_its_own_bits(sweep, folder):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    code, out, err = sweep("--trials", 7, "--output", "best.safetensors", "--plot", "trials.svg")
    assert code == 0 and err.endswith("again for best.safetensors\n")
    assert (folder / "trials.svg").read_bytes().startswith(b"<?xml")
    header, *lines, summary = out.splitlines()
    assert header.split() == ["trial", "validation", "train", "step", "seconds", "parameters", "settings"]
    losses = [float(line.split()[1]) for line in lines]
    assert losses == sorted(losses) and f"{len(lines)} trials ended, {7 - len(lines)} were stopped early" in summary
    _, out, _ = sweep("--trials", 7, "--json")
    best = json.loads(out)["trials"][0]
    assert lines[0].split()[0] == str(best["trial"]) and "lr " in lines[0] and "kernel_sizes [" in lines[0]
    checkpoint = load_checkpoint("best.safetensors")
    train, valid, _ = split_names(read_names("list.txt"))
    model, vocab = checkpoint.model, checkpoint.vocab
    assert evaluate(model, Corpus(valid, vocab, model)) == best["validation_loss"]
    assert evaluate(model, Corpus(train, vocab, model)) == best["train_loss"] == checkpoint.notes["train_loss"]
    assert checkpoint.notes["lr"] == best["settings"]["lr"] and len(checkpoint.quantiles) == 1001
    assert list(model.config.kernel_sizes) == best["settings"]["kernel_sizes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == best["parameters"]


@pytest.mark.slow
def test_two_processes_share_a_storage(start, sweep, folder):
    both = [start("--trials", "8", "--json") for _ in range(2)]
    printed = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert all(err.count(" of 8 trials") >= 1 for _, err in printed)
    found = rows(sweep("--trials", 8, "--json")[1])
    assert 8 <= len(found) <= 9 and [row["trial"] for row in found] == list(range(len(found)))
    assert len({json.dumps(row["settings"]) for row in found}) == len(found)
    assert set(states(folder)) <= {"COMPLETE", "PRUNED"}


@pytest.mark.slow
def test_a_killed_sweep_is_resumed(start, sweep, folder):
    process = start("--trials", "1000")
    for _ in range(3):
        line = process.stderr.readline()
        assert " of 1,000 trials" in line, line
    process.kill()
    process.communicate()
    done = sum(state in ("COMPLETE", "PRUNED") for state in states(folder))
    code, out, err = sweep("--trials", done + 2, "--json")
    assert code == 0 and err.count(" trials, best ") == 2 and len(rows(out)) == done + 2 >= 5


def test_an_interrupted_sweep_is_resumed(sweep, folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "report", interrupted)
        code, out, err = sweep("--trials", 2)
    assert (code, out) == (130, "")
    assert err == "wavenet-conv: interrupted; start again with the same arguments to continue\n"
    assert len(rows(sweep("--trials", 2, "--json")[1])) == 2
    assert states(folder)[0] == "FAIL" and len(states(folder)) == 3


def test_trials_that_were_killed_do_not_count(sweep, folder):
    sweep("--trials", 1)
    optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/sweep.db").ask()
    _, out, _ = sweep("--trials", 3, "--json")
    assert states(folder)[1] == "RUNNING" and [row["trial"] for row in rows(out)] == [0, 2, 3]


def test_a_trial_that_breaks_down_is_counted_and_not_kept(sweep, folder):
    (folder / "wild.toml").write_text(SMALL.replace("lr = {low = 1e-3, high = 0.3, log = true}", "lr = 1e9"))
    code, out, err = sweep("--trials", 2, "--output", "best.safetensors", space="wild.toml")
    assert (code, out) == (1, "") and "2 of 2 trials\n" in err and not (folder / "best.safetensors").exists()
    assert "none of 2 trials came to its end; the first: training broke down at step " in err
    assert states(folder) == ["PRUNED", "PRUNED"]


def test_a_study_of_another_sweep_is_rejected(sweep, folder):
    sweep("--trials", 1)
    (folder / "small.toml").write_text(SMALL.replace("steps = 6", "steps = 8"))
    code, out, err = sweep("--trials", 2)
    assert (code, out) == (2, "") and "(steps was 6 and is 8); give another --study" in err
    (folder / "small.toml").write_text(SMALL)
    with open("list.txt", "a") as file:
        file.write("\nemma\n")
    code, _, err = sweep("--trials", 2)
    assert code == 2 and "names_sha256" in err and len(states(folder)) == 1


def test_a_study_of_another_program_is_rejected(sweep):
    optuna.create_study(study_name="sweep", storage="sqlite:///sweep.db").optimize(lambda trial: 1.0, 1)
    code, _, err = sweep()
    assert code == 2 and "--study sweep: sqlite:///sweep.db has a sweep of that name with other settings (" in err


def test_the_space_in_the_package():
    space = Space.read("default")
    config, recipe = space.configured({"lr": 0.01, "n_embd": 16}, 27)
    assert (config.n_embd, recipe.lr) == (16, 0.01) and {"lr", "batch_size"} <= space.ranges.keys()


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = ", "not TOML in UTF-8 (Invalid value (at"),
        ('preset = "none"', "preset is 'none'; it must be one of "),
        ("preset = {}", "preset is {}; it must be one of "),
        ("rate = 1", "rate is not a setting; the settings are steps, batch_size, "),
        ("vocab_size = 27", "vocab_size is not a setting"),
        ("batch_size = 2.5", "batch_size is 2.5; it must be of type int"),
        ("gated = 1", "gated is 1; it must be of type bool"),
        ("dropout = 1", "dropout is 1; it must be at least 0 and below 1"),
        ("dropout = {low = 0.0, high = 1.5}", "dropout is 1.5; it must be at least 0 and below 1"),
        ("batch_size = {low = 8, high = 16.0}", "batch_size is 16.0; it must be of type int"),
        (
            "lr = {low = 2, high = 1}",
            "lr is {'low': 2, 'high': 1}; a range is {low = 0.1, high = 1.0} with low <= high",
        ),
        ("lr = {low = 0, high = 1, log = true}", "log = true only where low is above 0"),
        ("lr = {low = 0.1}", "lr is {'low': 0.1}; a range is"),
        ("batch_size = {choices = []}", "or {choices = [1, 2]} with at least one"),
        ("kernel_sizes = {choices = [[2, 2], [0]]}", "kernel_sizes[0] is 0; it must be an integer of at least 1"),
        ("n_hidden = [4, 5]\nkernel_sizes = {choices = [[2, 2], [8]]}", "n_hidden has 2 widths for 1 layers"),
        ("gated = {choices = [true, false]}\nbatch_norm = true", "gated layers have biases and no batch norm"),
    ],
)
def test_spaces_that_are_rejected(sweep, folder, text, message):
    (folder / "wrong.toml").write_text(text)
    code, out, err = sweep(space="wrong.toml")
    assert (code, out) == (2, "") and "wrong.toml: " in err and message in err
    assert not (folder / "sweep.db").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--trials", 0], "argument --trials: '0' is not an integer of at least 1"),
        (["--output", "list.txt"], "--output list.txt: this file is being read; give another one"),
        (["--output", "none/best.safetensors"], "in an existing folder; give another path"),
        (["--storage", "list.txt"], "--storage list.txt: Could not parse"),
        (["--storage", "sqlite:///none/sweep.db"], "unable to open database file; give another one, such as"),
        (["--storage", "sqlite:///list.txt"], "file is not a database"),
    ],
)
def test_wrong_usage(sweep, arguments, message):
    code, out, err = sweep(*arguments)
    assert (code, out) == (2, "") and message in err


def test_what_is_missing(sweep, monkeypatch):
    code, _, err = sweep(space="none.toml")
    assert code == 2 and "none.toml: No such file or directory; give a TOML file, or 'default'" in err
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = sweep()
    assert code == 2 and "a sweep needs optuna: pip install optuna" in err


def test_a_storage_that_fails_on_the_way(sweep, folder, monkeypatch):
    def lost(*_):
        raise optuna.exceptions.StorageInternalError("the disk is full")

    monkeypatch.setattr(optuna.Trial, "report", lost)
    code, out, err = sweep("--trials", 2)
    assert (code, out) == (1, "") and "sweep.db: the disk is full; fix that and start again to continue" in err
    assert states(folder) == ["FAIL"]


def test_processes_that_create_a_storage_together(sweep, monkeypatch):
    """Where another process makes a table first, the storage is opened again."""
    monkeypatch.setattr(command, "TABLES_WAIT", 0)
    create, opened = optuna.create_study, []

    def third(*arguments, **options):
        opened.append(options)
        if len(opened) < 3:
            raise RuntimeError("table studies already exists")
        return create(*arguments, **options)

    monkeypatch.setattr(optuna, "create_study", third)
    assert sweep("--trials", 1)[0] == 0 and len(opened) == 3
