"""`wavenet-conv sweep`: the same trials from the same seed, resumed, killed and shared; the best one's own bits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers import ROOT

from wavenet_conv import load_checkpoint
from wavenet_conv.cli.study import read_space
from wavenet_conv.names import read_names, sha256_of
from wavenet_conv.training import Corpus, evaluate, split_names

optuna = pytest.importorskip("optuna", reason="needs Optuna: pip install optuna")

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


@pytest.fixture
def sweep(folder, run):
    def call(*arguments, space="small.toml"):
        code, printed, err = run("sweep", space, "list.txt", "--device", "cpu", *arguments)
        return code, printed.decode(), err

    return call


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
    losses = [trial["validation_loss"] for trial in json.loads(out)["trials"] if trial["state"] == "ended"]
    whole = rows(out)
    assert losses == sorted(losses)
    assert len({json.dumps(row["settings"]) for row in whole}) == 12
    assert {row["state"] for row in whole} == {"ended", "stopped early"}
    for trials in (5, 12):
        code, out, _ = sweep("--trials", trials, "--study", "parts", "--json")
        assert (code, len(rows(out))) == (0, trials)
    assert rows(out) == whole
    code, out, err = sweep("--trials", 3, "--json")
    assert (code, err) == (0, "") and rows(out) == whole
    steps, losses = zip(*whole[0]["validations"])
    assert steps == (0, 2, 4, 6) and min(losses) == whole[0]["validation_loss"]


def test_the_best_trial_is_written_with_its_own_bits(sweep, folder):
    code, out, err = sweep("--trials", 7, "--output", "best.safetensors")
    assert code == 0 and err.endswith("again for best.safetensors\n")
    header, *lines, summary = out.splitlines()
    assert header.split() == ["trial", "validation", "train", "step", "seconds", "parameters", "settings"]
    assert f"{len(lines)} trials ended, {7 - len(lines)} were stopped early" in summary
    best = json.loads(sweep("--trials", 7, "--json")[1])["trials"][0]
    assert lines[0].split()[0] == str(best["trial"]) and "lr " in lines[0] and "kernel_sizes [" in lines[0]
    checkpoint = load_checkpoint("best.safetensors")
    train, valid, _ = split_names(read_names("list.txt"))
    model, vocab = checkpoint.model, checkpoint.vocab
    assert evaluate(model, Corpus(valid, vocab, model)) == best["validation_loss"]
    assert evaluate(model, Corpus(train, vocab, model)) == best["train_loss"] == checkpoint.notes["train_loss"]
    assert checkpoint.notes["lr"] == best["settings"]["lr"] and len(checkpoint.quantiles) == 1001
    assert checkpoint.notes["names_sha256"] == sha256_of(read_names("list.txt"))  # the whole list


@pytest.mark.slow
def test_two_processes_share_a_storage(sweep, folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "wavenet_conv", "sweep", "small.toml", "list.txt", "--trials", "8"]
    both = [subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[1] for process in both]
    assert all(process.returncode == 0 for process in both) and all(" of 8 trials" in err for err in printed), printed
    found = rows(sweep("--trials", 8, "--json")[1])
    assert 8 <= len(found) <= 9 and [row["trial"] for row in found] == list(range(len(found)))
    assert len({json.dumps(row["settings"]) for row in found}) == len(found)
    assert set(states(folder)) <= {"COMPLETE", "PRUNED"}


FULL = optuna.exceptions.StorageInternalError("the disk is full")


@pytest.mark.parametrize(
    "error, code, message",
    [(KeyboardInterrupt, 130, "interrupted; start again"), (FULL, 1, "sweep.db: the disk is full; fix that and start")],
)
def test_trials_that_failed_or_were_killed_do_not_count(sweep, folder, monkeypatch, error, code, message):
    def report(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "report", report)
        found, out, err = sweep("--trials", 2)
    assert (found, out) == (code, "") and message in err
    optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/sweep.db").ask()
    assert [row["trial"] for row in rows(sweep("--trials", 2, "--json")[1])] == [2, 3]
    assert states(folder)[:2] == ["FAIL", "RUNNING"]


def test_a_trial_that_breaks_down_is_counted_and_not_kept(sweep, folder):
    (folder / "wild.toml").write_text(SMALL.replace("lr = {low = 1e-3, high = 0.3, log = true}", "lr = 1e9"))
    code, out, err = sweep("--trials", 2, "--output", "best.safetensors", space="wild.toml")
    assert (code, out) == (1, "") and "2 of 2 trials\n" in err and not (folder / "best.safetensors").exists()
    assert "none of 2 trials came to its end; the first: training broke down at step " in err
    assert states(folder) == ["PRUNED", "PRUNED"]


def test_a_study_of_another_sweep_or_program_is_rejected(sweep, folder):
    sweep("--trials", 1)
    (folder / "small.toml").write_text(SMALL.replace("steps = 6", "steps = 8"))
    (folder / "list.txt").write_text((folder / "list.txt").read_text() + "\nemma\n")
    code, out, err = sweep("--trials", 2)
    assert (code, out) == (2, "") and "(names_sha256 was '" in err and "steps was 6 and is 8); give another name" in err
    optuna.create_study(study_name="other", storage="sqlite:///sweep.db").optimize(lambda trial: 1.0, 1)
    code, _, err = sweep("--study", "other")
    assert code == 2 and "--study other: sqlite:///sweep.db has it with other settings (" in err
    assert {"lr", "batch_size"} <= read_space("default")[2].keys()


def test_a_sweep_may_choose_norms_activations_and_heads(sweep, folder):
    text = (
        SMALL + 'norm = {choices = ["layer", "none"]}\nactivation = "gelu"\nhead_norm = "batch"\nhead_kernel_size = 2\n'
    )
    (folder / "kinds.toml").write_text(text)
    assert sweep("--trials", 2, "--output", "best.safetensors", space="kinds.toml")[0] == 0
    config = load_checkpoint("best.safetensors").model.config
    assert {*config.norms} < {"layer", "none"} and {*config.activations} == {"gelu"}
    assert (config.head_norm, config.head_kernel_size) == ("batch", 2)


def test_presets_with_teachers_are_swept_without_drawn_names(sweep, folder):
    (folder / "wide.toml").write_text(
        'preset = "wide"\ndistill_weight = {low = 0.1, high = 0.9}\nsteps = 2\n' + "n_hidden = 4"
    )
    code, out, _ = sweep("--trials", 2, "--json", space="wide.toml")
    losses = [trial["validation_loss"] for trial in json.loads(out)["trials"]]
    assert code == 0 and losses[0] != losses[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = ", "; give a TOML file in UTF-8, or 'default'"),
        ('preset = "none"', "preset is 'none'; it must be one of "),
        ("drawn = 1", "drawn is not a setting"),
        ("ngram_share = 0.5", "ngram_share is not a setting"),
        ('preset = "plain"\ndistill_weight = 0.5', "distill_weight does nothing, since preset 'plain' has no n-grams"),
        ("rate = 1", "rate is not a setting; the settings are steps, batch_size, "),
        ('norm = "bath"', "norm is 'bath'; it must be one of 'batch', 'layer', 'none'"),
        ("batch_size = 2.5", "batch_size is 2.5; give a value of type int, {choices = "),
        ("dropout = {low = 0.0, high = 1.5}", "dropout is 1.5; it must be at least 0 and below 1"),
        ("lr = {low = 2, high = 1}", "lr is {'low': 2, 'high': 1}; give a value of type float"),
        ("lr = {choices = 5}", "lr is {'choices': 5}; give a value of type float, {choices = [...]}"),
        ("lr = {choices = [{low = 1, high = 2}]}", "lr is {'choices': [{"),
        ("lr = {choices = [0.1], low = 1}", "lr is {'choices': [0.1], 'low': 1}; give"),
        ("lr = {low = 1, high = 2, log = 1}", "lr is {'low': 1, 'high': 2, 'log': 1}; give"),
        ("n_hidden = {low = [4], high = [8]}", "n_hidden is {'low': [4], 'high': [8]}; give a value of type int"),
        ("optimizer = {low = 'adamw', high = 'sgd'}", "optimizer is {'low': 'adamw', 'high': 'sgd'}; give"),
        ("gated = {low = false, high = true}", "gated is {'low': False, 'high': True}; give a value of type bool"),
        ("n_hidden = [4, 5]\nkernel_sizes = {choices = [[2, 2], [8]]}", "n_hidden has 2 entries for 1 layers"),
    ],
)
def test_spaces_that_are_rejected(sweep, folder, text, message):
    (folder / "wrong.toml").write_text(text)
    code, out, err = sweep("--trials", 1, space="wrong.toml")
    assert (code, out) == (2, "") and "wrong.toml: " in err and message in err
    assert not (folder / "sweep.db").exists()


def test_models_that_are_too_large_are_rejected(sweep, folder):
    for width in (10**12, 10**30):
        (folder / "wrong.toml").write_text(f"n_embd = {{choices = [{width}]}}")
        code, out, err = sweep("--trials", 1, "--study", width, space="wrong.toml")
        assert (code, out) == (2, "") and "wrong.toml: this model cannot be built here (" in err
        assert (
            "use a smaller one: WaveNetConfig(vocab_size=" in err
            and f"n_embd={width}, " in err
            and "Traceback" not in err
        )


def test_storages_that_are_rejected(sweep, monkeypatch):
    for storage, message in (
        ("list.txt", "--storage list.txt: Could not parse"),
        ("sqlite:///none/sweep.db", "unable to open database file; give another one, such as"),
    ):
        code, out, err = sweep("--storage", storage)
        assert (code, out) == (2, "") and message in err
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "wavenet_conv.cli.study")
    code, _, err = sweep()
    assert code == 2 and "a sweep needs optuna: pip install optuna" in err
