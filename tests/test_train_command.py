"""`wavenet-conv train` as its users run it: real files, real processes, killed and resumed, and refused by name."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from wavenet_conv import Scorer
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.cli import main
from wavenet_conv.files import locked
from wavenet_conv.training import PRESETS, TEACHERS, Recipe, Trainer

SMALL = ["--n-embd", "6", "--n-hidden", "16", "--steps", "12", "--every", "4", "--batch", "32"]
COMMAND = [sys.executable, "-m", "wavenet_conv.cli", "train"]


@pytest.fixture
def listed(tmp_path, names):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names[:400]) + "\n")
    return path


@pytest.fixture
def run(capsys):
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*arguments):
        try:
            code = main(["train", *map(str, arguments)])
        except SystemExit as leaving:
            code = leaving.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def weights(path):
    return load_checkpoint(path).model.state_dict()


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_from_list_to_scores(run, tmp_path, listed):
    out = tmp_path / "model.safetensors"
    code, text, err = run(listed, "-o", out, *SMALL, "--test", "--json")
    results = json.loads(text)
    assert code == 0 and text.count("\n") == 1
    assert err.splitlines()[0] == f"{listed}: 400 names, split 320 / 40 / 40 to train, validate and test on"
    assert "step 12 of 12: train " in err and sorted(path.name for path in tmp_path.iterdir()) == [
        out.name,
        "names.txt",
    ]
    assert results["parameters"] == 1910 and results["steps_taken"] == 12 and results["best_step"] in (4, 8, 12)
    assert 2 < results["train_loss"] < 3.3 and 2 < results["test_loss"] < 3.3
    checkpoint = load_checkpoint(out)
    assert checkpoint.notes["validation_loss"] == results["validation_loss"] and checkpoint.notes["seed"] == 42
    scorer = Scorer.load(out)
    assert 0 <= float(scorer.percentile(["emma"])) <= 100
    code, text, _ = run(listed, "-o", tmp_path / "again.safetensors", *SMALL)
    assert code == 0 and text.startswith("train_loss ") and "test_loss" not in text
    assert_same(out, tmp_path / "again.safetensors")
    code, text, _ = run(listed, "-o", tmp_path / "short.safetensors", *SMALL, "--seconds", 0, "--json")
    assert code == 0 and json.loads(text)["steps_taken"] == 4
    assert run(listed, "-o", tmp_path / "other.safetensors", *SMALL, "--seed", 1)[0] == 0
    assert not torch.equal(weights(tmp_path / "other.safetensors")["head.weight"], weights(out)["head.weight"])


def test_gated_layers_dropout_averages_and_epochs(run, tmp_path, listed):
    out = tmp_path / "model.safetensors"
    options = ["--gated", "--kernel-sizes", "2,3", "--epochs", 2, "--dropout", 0.1, "--average", 0.9]
    code, text, _ = run(listed, "-o", out, "--n-embd", 6, "--n-hidden", 8, "--batch", 64, *options, "--json")
    assert code == 0 and json.loads(text)["steps_taken"] == 10
    assert load_checkpoint(out).model.config.kernel_sizes == (2, 3) and load_checkpoint(out).model.config.gated


def test_a_plot_of_losses_and_of_an_embedding_in_the_plane(run, tmp_path, listed):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    arguments = [listed, "-o", tmp_path / "model.safetensors", *SMALL, "--n-embd", 2]
    code, _, err = run(*arguments, "--plot", tmp_path / "loss.odd")
    assert code == 2 and "loss.odd" in err and not (tmp_path / "model.safetensors").exists()
    assert run(*arguments, "--plot", tmp_path / "loss.png")[0] == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_killed_and_resumed_it_ends_with_the_same_bits(run, tmp_path, listed):
    """Killed after the first, and after a later validation; each time what stood before stays whole."""
    out, undisturbed = tmp_path / "model.safetensors", tmp_path / "undisturbed.safetensors"
    arguments = [*SMALL, "--dropout", "0.1", "--average", "0.9", "--steps", "60"]
    threads = str(torch.get_num_threads())
    for last in ("step 4 of", "step 32 of"):
        with subprocess.Popen(
            [*COMMAND, listed, "-o", out, *arguments, "--resume"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            cwd=ROOT,
        ) as process:
            for line in process.stderr:
                if line.startswith(last):
                    process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL and not out.exists()
    code, _, err = run(listed, "-o", out, *arguments)
    assert code == 2 and "this training was interrupted; add --resume, or delete this file" in err
    code, _, err = run(listed, "-o", out, *arguments, "--resume")
    assert code == 0 and "going on after step " in err
    assert run(listed, "-o", undisturbed, *arguments)[0] == 0
    assert_same(out, undisturbed)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"names.txt", out.name, undisturbed.name}


def test_a_preset_with_teachers_is_killed_and_resumed(run, tmp_path, listed, monkeypatch):
    """Interrupted inside the second teacher; the first is not trained again, and no file of theirs is left."""
    small = {"n_embd": 4, "n_hidden": 8}
    monkeypatch.setitem(PRESETS, "wide", (small, Recipe(steps=6, batch=64, every=2)))
    monkeypatch.setitem(
        PRESETS, "plain", (small | {"gated": True, "kernel_sizes": (2, 2)}, Recipe(steps=4, batch=64, every=2))
    )
    monkeypatch.setitem(TEACHERS, "wide", ("plain", "plain"))
    arguments, out = ["--preset", "wide", "--json"], tmp_path / "model.safetensors"
    whole = tmp_path / "whole.safetensors"
    code, text, err = run(listed, "-o", whole, *arguments)
    assert code == 0 and err.count("training a teacher, plain with seed") == 2 and len(list(tmp_path.iterdir())) == 2
    honest, steps = Trainer.advance, []

    def interrupted(trainer):
        steps.append(trainer.step)
        if len(steps) == 8:  # the first teacher takes four steps, and the second has been validated after two
            raise KeyboardInterrupt
        honest(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        assert run(listed, "-o", out, *arguments)[0] == 130
    assert {path.name for path in tmp_path.iterdir()} >= {f"{out.name}.teacher-43", f"{out.name}.teacher-44.training"}
    code, text, err = run(listed, "-o", out, *arguments, "--resume")
    assert code == 0 and err.count("training a teacher") == 1 and "going on after step 2" in err
    assert_same(out, whole)
    assert load_checkpoint(out).notes["teachers"] == load_checkpoint(whole).notes["teachers"] != []
    assert {path.name for path in tmp_path.iterdir()} == {"names.txt", out.name, whole.name}
    given = [*arguments, "--taught", "0.5", "--teacher", whole]
    assert run(listed, "-o", out, *given)[0] == 0 and len(load_checkpoint(out).notes["teachers"]) == 1
    code, _, err = run(listed, "-o", out, *arguments, "--teacher", listed)
    assert code == 2 and "--teacher" in err and "not a safetensors file" in err
    listed.write_text(listed.read_text() + "zoë\n")
    code, _, err = run(listed, "-o", out, *arguments, "--teacher", whole)
    assert code == 2 and "its characters are" in err


RANK = """
import sys
from pathlib import Path
from wavenet_conv.cli import main

code = main(sys.argv[1:])
running = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
sys.exit(code or any("gloo" in name for name in running))  # a thread of the process group may abort the exit
"""


def test_two_ranks_train_as_one(run, tmp_path, listed):
    """torchrun with two gloo ranks, float64: a batch spread over ranks gives the same weights and losses."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    arguments = [*SMALL, "--dtype", "float64", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "rank.py").write_text(RANK)
    ranks = subprocess.run(
        [*torchrun, tmp_path / "rank.py", "train", listed, "-o", two, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ranks.returncode == 0, ranks.stderr
    code, text, _ = run(listed, "-o", one, *arguments)
    assert code == 0
    found, expected = json.loads(ranks.stdout), json.loads(text)
    assert abs(found["validation_loss"] - expected["validation_loss"]) < 1e-10
    assert load_checkpoint(two).notes["ranks"] == 2
    for name, tensor in weights(one).items():
        assert (tensor - weights(two)[name]).abs().max() < 1e-10, name


def test_a_full_disk_leaves_the_previous_checkpoint(run, tmp_path, listed):
    out = tmp_path / "model.safetensors"
    assert run(listed, "-o", out, *SMALL)[0] == 0
    before = out.read_bytes()
    full = subprocess.run(
        [*COMMAND, listed, "-o", out, *SMALL, "--seed", "7"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "model.safetensors.training: File too large; mend that and start again with --resume" in full.stderr
    assert out.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {out.name, "names.txt"}


def test_two_trainings_with_one_output(run, tmp_path, listed):
    out = tmp_path / "model.safetensors"
    with locked(f"{out}.lock"):
        code, _, err = run(listed, "-o", out, *SMALL)
    assert code == 1 and "model.safetensors.lock: another process is writing there" in err and not out.exists()
    assert run(listed, "-o", out, *SMALL)[0] == 0


def test_a_breakdown_keeps_the_last_good_checkpoint(run, tmp_path, listed):
    out = tmp_path / "model.safetensors"
    assert run(listed, "-o", out, *SMALL)[0] == 0
    before = out.read_bytes()
    wild = ["--optimizer", "sgd", "--schedule", "constant", "--lr", "1e4"]
    code, text, err = run(listed, "-o", out, *SMALL, *wild)
    assert (
        (code, text) == (1, "") and "training broke down at step " in err and "with a learning rate up to 10000" in err
    )
    assert "try a lower one, such as --lr 3e+03" in err and out.read_bytes() == before
    late = ["--steps", "400", "--every", "1", "--schedule", "onecycle", "--optimizer", "sgd", "--lr", "1e4"]
    code, _, err = run(listed, "-o", out, *SMALL, *late)
    assert code == 1 and (f"; delete {out}.training first" in err) == (tmp_path / "model.safetensors.training").exists()


def test_a_resume_with_other_arguments_or_another_list(run, tmp_path, listed, monkeypatch):
    out = tmp_path / "model.safetensors"
    monkeypatch.setattr("wavenet_conv.train_command._finish", lambda *_: None)
    assert run(listed, "-o", out, *SMALL)[0] == 0
    state = tmp_path / "model.safetensors.training"
    kept = state.read_bytes()
    code, _, err = run(listed, "-o", out, *SMALL, "--lr", "0.5", "--resume")
    assert code == 2 and "of another run: lr was 0.01 and is 0.5; use the same arguments, or delete it" in err
    listed.write_text(listed.read_text() + "zoe\n")
    code, _, err = run(listed, "-o", out, *SMALL, "--resume")
    assert code == 2 and "of another run: names_sha256 was " in err
    assert state.read_bytes() == kept
    state.write_bytes(kept[: len(kept) // 2])
    code, _, err = run(listed, "-o", out, *SMALL, "--resume")
    assert code == 2 and "not the state of a training" in err and "delete it to start anew" in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("emma\n", "1 names are too few to split 80/10/10; give at least 10"),
        ("", "no names in it"),
        ("emma\nan.na\n", "line 2 ('an.na'): '.' marks the end of a name"),
    ],
)
def test_lists_that_cannot_be_trained_on(run, tmp_path, listed, text, message):
    listed.write_text(text)
    code, out, err = run(listed, "-o", tmp_path / "model.safetensors", *SMALL)
    assert (code, out) == (2, "") and message in err


def test_names_all_alike_and_characters_of_one_part_only(run, tmp_path, listed):
    listed.write_text("emma\n\n" * 50)
    code, _, err = run(listed, "-o", tmp_path / "model.safetensors", *SMALL)
    assert code == 0 and "49 names are in the list more than once; 10 held-out names are also trained on" in err
    listed.write_text("\n".join(["emma"] * 40 + ["zoë"] + ["ava"] * 9))
    code, _, err = run(listed, "-o", tmp_path / "model.safetensors", *SMALL)
    assert code == 0
    assert "characters that are never trained on: o z ë" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr", "0"], "lr is 0.0; it must be a positive number"),
        (["--kernel-sizes", "2,0"], "kernel_sizes[1] is 0; it must be an integer of at least 1"),
        (["--preset", "slow"], "invalid choice: 'slow'"),
        (["--kernel-sizes", "2;2"], "'2;2' is not a list of integers such as 2,2,2"),
        (["--seconds", "nan"], "--seconds is nan; it must be a number of at least 0"),
        (["--seed", "20000000000000"], "seed is 20000000000000; it must be at least 0 and below 2**30"),
        (["--n-embd", "1000000000000"], "this model cannot be built here"),
        (["--steps", "3", "--epochs", "1"], "not allowed with argument"),
    ],
)
def test_wrong_usage(run, tmp_path, listed, arguments, message):
    code, out, err = run(listed, "-o", tmp_path / "model.safetensors", *arguments)
    assert (code, out) == (2, "") and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["names.txt"]


def test_an_output_that_cannot_be(run, tmp_path, listed):
    assert "this file is being read; give another one" in run(listed, "-o", listed, *SMALL)[2]
    assert "not a file in a folder that is there" in run(listed, "-o", tmp_path, *SMALL)[2]
    assert run(listed, "-o", tmp_path / "missing" / "m", *SMALL)[0] == 2
    assert "give a text file" in run(tmp_path / "no.txt", "-o", tmp_path / "m", *SMALL)[2]
