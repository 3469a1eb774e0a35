"""`wavenet-conv train`: from a list to a checkpoint, resumed to the same bits, over ranks, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from filelock import FileLock
from helpers import ROOT

from wavenet_conv import Scorer, load_checkpoint
from wavenet_conv.training import PRESETS, TEACHERS, Corpus, Recipe, evaluate, split_names

SMALL = ["--n-embd", "6", "--n-hidden", "16", "--steps", "12", "--eval-every", "4", "--batch-size", "32"]


def weights(path):
    return load_checkpoint(path).model.state_dict()


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_training_from_list_to_scores(train, tmp_path, listed, out, names):
    code, text, err = train(*SMALL, "--test", "--json")
    results = json.loads(text)
    assert code == 0 and text.count("\n") == 1
    assert err.splitlines()[0] == f"{listed}: 400 names, split 320 / 40 / 40 to train, validate and test on"
    assert "step 12 of 12: train " in err and files(tmp_path) == {out.name, "names.txt"}
    assert results["parameters"] == 1910 and results["steps_taken"] == 12
    checkpoint, parts = load_checkpoint(out), split_names(names[:400])
    for part, name in zip(parts, ("train_loss", "validation_loss", "test_loss")):
        found = evaluate(checkpoint.model, Corpus(part, checkpoint.vocab, checkpoint.model))
        assert abs(found - results[name]) < 1e-5
    notes = checkpoint.notes
    assert notes["validation_loss"] == results["validation_loss"] and (notes["seed"], notes["preset"]) == (42, "fast")
    assert (notes["names"], notes["batch_size"], len(notes["names_sha256"])) == (400, 32, 64)
    assert 0 <= float(Scorer.load(out).percentile(["emma"])) <= 100
    code, text, _ = train(*SMALL, output=tmp_path / "again")
    assert code == 0 and text.startswith("preset fast, seconds ") and "test_loss" not in text
    assert_same(out, tmp_path / "again")


def test_gated_layers_and_a_plot(train, tmp_path, out):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    for n_embd in (2, 6):  # an embedding that is two wide is plotted too
        plot = tmp_path / f"{n_embd}.png"
        assert (
            train(*SMALL, "--gated", "--kernel-sizes", "2,3", "--n-embd", n_embd, "--plot", plot, "--overwrite")[0] == 0
        )
        config = load_checkpoint(out).model.config
        assert config.gated and config.kernel_sizes == (2, 3) and plot.read_bytes().startswith(b"\x89PNG")


def test_epochs_and_seconds_limit_the_steps(train, out):
    options = ["--n-embd", "2", "--n-hidden", "4", "--batch-size", "64", "--eval-every", "2", "--json", "--overwrite"]
    assert json.loads(train(*options, "--epochs", "2")[1])["steps_taken"] == 10  # of 320 names
    assert json.loads(train(*options, "--seconds", "0")[1])["steps_taken"] == 2
    assert "steps is 0; it must be at least 1" in train(*options, "--epochs", "0")[2]
    assert train(*options, "--epochs", "1", "--steps", "9")[0] == 2


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_bits(train, tmp_path, listed, out):
    whole, arguments = tmp_path / "whole", [*SMALL, "--dropout", "0.1", "--ema-decay", "0.9", "--steps", "60"]
    command = [sys.executable, "-m", "wavenet_conv", "train", listed, "-o", out, *arguments, "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stderr:
            if line.startswith("step 32 of"):
                process.kill()
    assert process.returncode != 0 and not out.exists()
    code, _, err = train(*arguments, "--resume")
    assert code == 0 and "resuming after step " in err
    assert train(*arguments, output=whole)[0] == 0
    assert_same(out, whole)
    assert files(tmp_path) == {"names.txt", out.name, whole.name}


def test_interrupted_and_resumed_it_ends_with_the_same_bits(train, tmp_path, out, interrupt):
    arguments, state = [*SMALL, "--dropout", "0.1", "--ema-decay", "0.9"], out.with_name(f"{out.name}.training")
    assert train(*arguments, output=tmp_path / "whole")[0] == 0
    interrupt(11)
    code, text, err = train(*arguments)
    assert (code, text) == (130, "") and files(tmp_path) == {"names.txt", "whole", state.name}
    assert err.endswith("interrupted; start again with the same arguments and --resume to continue\n")
    assert "this training was interrupted; add --resume, or delete this file" in train(*arguments)[2]
    code, _, err = train(*arguments, "--lr", "0.5", "--resume")
    assert code == 2 and "of another run: lr was 0.01 and is 0.5; use the same arguments, or delete it" in err
    data = state.read_bytes()
    state.write_bytes(data[: len(data) // 2])
    code, _, err = train(*arguments, "--resume")
    assert code == 2 and "not the state of a training" in err and "delete it to start again" in err
    state.write_bytes(data)
    code, _, err = train(*arguments, "--resume")
    assert code == 0 and "resuming after step 8\n" in err and "step 4 of" not in err
    assert_same(out, tmp_path / "whole")


def test_a_preset_with_teachers_is_interrupted_and_resumed(train, tmp_path, listed, out, monkeypatch, interrupt):
    """Interrupted inside the second teacher; the first is not trained again, and no file of theirs is left."""
    small, whole = {"n_embd": 4, "n_hidden": 8}, tmp_path / "whole.safetensors"
    gated = small | {"gated": True, "kernel_sizes": (2, 2)}
    monkeypatch.setitem(PRESETS, "wide", (small, Recipe(steps=6, batch_size=64, eval_every=2)))
    monkeypatch.setitem(PRESETS, "plain", (gated, Recipe(steps=4, batch_size=64, eval_every=2)))
    monkeypatch.setitem(TEACHERS, "wide", ("plain", "plain"))
    arguments = ["--preset", "wide", "--json"]
    code, _, err = train(*arguments, output=whole)
    assert code == 0 and err.count("training a teacher, plain with seed") == 2
    assert files(tmp_path) == {whole.name, "names.txt"}
    interrupt(8)  # the first teacher takes four steps, and the second has been validated after two
    assert train(*arguments)[0] == 130
    assert files(tmp_path) >= {f"{out.name}.teacher-43", f"{out.name}.teacher-44.training"}
    code, _, err = train(*arguments, "--resume")
    assert code == 0 and err.count("training a teacher") == 1 and "resuming after step 2" in err
    assert_same(out, whole)
    assert load_checkpoint(out).notes["teachers"] == load_checkpoint(whole).notes["teachers"] != []
    assert files(tmp_path) == {"names.txt", out.name, whole.name}
    assert train(*arguments, "--distill-weight", "0.5", "--teacher", whole, "--overwrite")[0] == 0
    assert len(load_checkpoint(out).notes["teachers"]) == 1
    arguments.append("--overwrite")
    code, _, err = train(*arguments, "--teacher", listed)
    assert code == 2 and "--teacher" in err and "not a safetensors file" in err
    listed.write_text(listed.read_text() + "zoë\n")
    code, _, err = train(*arguments, "--teacher", whole)
    assert code == 2 and "its vocabulary is" in err


def test_the_networks_and_n_grams_that_teach(train, tmp_path, listed, out):
    """A teacher that is given counts beside the n-grams of `fast`; the steps of an epoch count what it draws."""
    teachers = [tmp_path / "one", tmp_path / "two"]
    for teacher, steps in zip(teachers, ("12", "2")):
        assert train(*SMALL[:4], "--steps", steps, "--ngram-share", "0", output=teacher)[0] == 0
    losses = set()
    for teacher in teachers:
        code, text, _ = train(*SMALL, "--teacher", teacher, "--json", "--overwrite")
        losses.add(json.loads(text)["validation_loss"])
        assert code == 0 and load_checkpoint(out).notes["ngram_share"] == 0.3
    assert len(losses) == 2
    arguments = [*SMALL[:4], "--overwrite", "--json", "--epochs", "2", "--batch-size", "100", "--teacher", teachers[0]]
    for drawn, steps in ((0, 2 * 4), (3, 2 * 13)):  # of 320 and 1,280 names
        code, text, _ = train(*arguments, "--drawn", drawn)
        assert code == 0 and json.loads(text)["steps_taken"] == steps


def test_a_share_of_teachers_without_teachers(train, out):
    code, _, err = train(*SMALL, "--preset", "plain", "--distill-weight", "0.5")
    assert code == 2 and not out.exists()
    assert "--distill-weight 0.5: nothing teaches here; give --teacher, or --ngram-share above 0" in err
    code, _, err = train(*SMALL, "--ngram-share", "0.5", "--distill-weight", "0")
    assert code == 2 and "--ngram-share 0.5: with --distill-weight 0 nothing teaches; leave one out" in err
    assert train(*SMALL, "--preset", "plain", "--distill-weight", "0")[0] == 0


def test_fewer_steps_are_suggested_where_the_best_is_early(train):
    short = [*SMALL[:4], "--batch-size", "320", "--eval-every", "20"]
    code, text, err = train(*short, "--steps", "400", "--ngram-share", "0", "--json")
    best = json.loads(text)["best_step"]
    assert code == 0 and 0 < best <= 200
    assert f"lowest at step {best} of 400; fewer steps (--steps {best}, or fewer --epochs) may give a lower one" in err
    for others in (SMALL, [*short, "--steps", "4000", "--ngram-share", "0", "--patience", "3"]):
        assert "fewer steps" not in train(*others, "--overwrite")[2]


def test_without_networks_no_names_are_drawn(train, out):
    code, _, err = train(*SMALL, "--drawn", "1")
    assert code == 2 and "--drawn 1: networks draw names, and none teaches here; give --teacher too" in err
    assert train(*SMALL, "--preset", "wide", "--distill-weight", "0")[0] == 0
    notes = load_checkpoint(out).notes
    assert (notes["drawn"], notes["teachers"]) == (0, [])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_training_that_does_not_fit_in_memory(train, out, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("wavenet_conv.training.teaching.cross_fitted", full)
    code, _, err = train(*SMALL)
    assert code == 1 and "does not fit in memory" in err and "--ngram-share 0" in err and not out.exists()
    monkeypatch.setattr("wavenet_conv.training.teaching.cross_fitted", lambda *_: 1 + "a")
    with pytest.raises(TypeError):
        train(*SMALL)


RANK = """
import sys
from pathlib import Path
from wavenet_conv.cli import main

code = main(sys.argv[1:])
sys.exit(code or any("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.slow
def test_two_ranks_train_as_one(train, tmp_path, out, listed):
    """torchrun with two gloo ranks, float64: the same weights and losses, and no thread that may abort the exit."""
    two, teacher = tmp_path / "two.safetensors", tmp_path / "teacher"
    assert train(*SMALL, output=teacher)[0] == 0
    arguments = [*SMALL, "--dtype", "float64", "--json", "--teacher", teacher, "--drawn", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-c", RANK, "train", listed, "-o", two, "--device", "cpu", *arguments]
    ranks = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ranks.returncode == 0, ranks.stderr
    code, text, _ = train(*arguments)
    found, expected = json.loads(ranks.stdout), json.loads(text)
    assert code == 0 and abs(found["validation_loss"] - expected["validation_loss"]) < 1e-10
    assert load_checkpoint(two).notes["ranks"] == 2
    for name, tensor in weights(out).items():
        assert (tensor - weights(two)[name]).abs().max() < 1e-10, name


def test_a_full_disk_leaves_the_previous_checkpoint(train, out, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    assert train(*SMALL)[0] == 0
    before, other = out.read_bytes(), ["--seed", "7", "--overwrite"]
    for function in ("write_whole", "save_checkpoint"):
        with monkeypatch.context() as patch:
            patch.setattr(f"wavenet_conv.cli.resumable.{function}", full)
            code, text, err = train(*SMALL, *other)
        assert (code, text) == (1, "") and ": No space left on device; fix that and start again with --resume" in err
        assert out.read_bytes() == before
    assert train(*SMALL, *other, "--resume")[0] == 0 and out.read_bytes() != before


def test_another_training_or_a_breakdown_writes_nothing(train, out):
    with FileLock(f"{out}.lock"):
        code, _, err = train(*SMALL)
    assert code == 1 and ".lock' could not be acquired; fix that, or wait until the other training there ends" in err
    code, text, err = train(*SMALL, "--optimizer", "sgd", "--schedule", "constant", "--lr", "1e4")
    assert (code, text) == (1, "") and "training broke down at step " in err and not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lr", "0"], "lr is 0.0; it must be a positive number"),
        (["--kernel-sizes", "2,0"], "kernel_sizes[1] is 0; it must be an integer of at least 1"),
        (["--kernel-sizes", "2;2"], "'2;2' is not a list of integers such as 2,2,2"),
        (["--n-embd", "1000000000000"], "this model cannot be built here"),
    ],
)
def test_wrong_usage(train, tmp_path, listed, arguments, message):
    code, out, err = train(*arguments)
    assert (code, out) == (2, "") and message in err and files(tmp_path) == {"names.txt"}
    assert "this file is being read; give another one" in train(output=listed)[2]
    assert "--output -: give the name of a file" in train(output="-")[2]
    assert "reads text with one name per line" in train(file=tmp_path / "names.csv")[2]
    listed.write_text("emma\n")
    assert "1 names are too few to split 80/10/10; give at least 10" in train()[2]
