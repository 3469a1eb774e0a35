"""`wavenet-conv train`: finished outputs stay, training goes on from a checkpoint, and names may have dots."""

from __future__ import annotations

import json
import random

import pytest
import torch

from wavenet_conv import Scorer, Vocabulary, load_checkpoint
from wavenet_conv.training import Corpus, evaluate, split_names

SMALL = ["--n-embd", "6", "--n-hidden", "16", "--steps", "12", "--eval-every", "4", "--batch-size", "32"]
SHORT = ["--steps", "4", "--eval-every", "2", "--batch-size", "32"]


@pytest.fixture
def trained(train, tmp_path):
    """A checkpoint of the list."""
    path = tmp_path / "trained.safetensors"
    assert train(*SMALL, output=path)[0] == 0
    return path


def test_a_finished_output_is_not_replaced_unasked(train, trained, tmp_path):
    before = trained.read_bytes()
    code, text, err = train(*SMALL, file=tmp_path / "missing", output=trained)  # before the list is read
    assert (code, text) == (2, "") and f"--output {trained}: this file is there already; give another path" in err
    code, text, err = train(*SMALL, "--resume", output=trained)
    assert (
        (code, text) == (0, "") and f"\n{trained}: this training is finished; give --from" in err and "step" not in err
    )
    code, text, err = train(*SMALL, "--resume", "--lr", "0.5", output=trained)
    assert (code, text) == (2, "") and "of another run: lr was 0.01 and is 0.5; give another path, or add --over" in err
    assert train(*SMALL, "--resume", "--overwrite", output=trained)[0] == 0
    assert trained.read_bytes() == before
    assert train(*SMALL, "--overwrite", "--resume", "--lr", "0.5", output=trained)[0] == 0
    assert load_checkpoint(trained).notes["lr"] == 0.5
    trained.write_text("no checkpoint")
    code, _, err = train(*SMALL, "--resume", output=trained)
    assert code == 2 and "not a safetensors file" in err and trained.read_text() == "no checkpoint"
    assert train(*SMALL, "--overwrite", output=trained)[0] == 0 and load_checkpoint(trained).notes["lr"] == 0.01


@pytest.mark.parametrize("options", [[], ["--ema-decay", "0.9"], ["--dtype", "float64"]], ids=str)
def test_training_from_a_checkpoint_is_never_worse(train, trained, out, names, options):
    def loss(path):
        checkpoint = load_checkpoint(path)
        return evaluate(checkpoint.model, Corpus(split_names(names[:400])[1], checkpoint.vocab, checkpoint.model))

    code, text, err = train("--from", trained, *SHORT, "--lr", "3", "--json", *options)  # a rate that harms
    assert code == 0 and json.loads(text)["best_step"] == 0 and "the weights at the start are kept" in err
    one, other = (load_checkpoint(path) for path in (trained, out))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor.to(other.model.embedding.weight.dtype))
    assert other.model.config == one.model.config and other.vocab == one.vocab
    code, text, _ = train("--from", trained, *SHORT, "--lr", "0.003", "--json", "--overwrite", *options)
    result = json.loads(text)
    assert code == 0 and result["best_step"] > 0 and loss(out) < loss(trained)
    assert result["validation_loss"] == pytest.approx(loss(out), abs=1e-5)


def test_training_from_a_checkpoint_is_resumed_to_the_same_bits(train, trained, out, tmp_path, interrupt):
    arguments, whole = ["--from", trained, *SHORT], tmp_path / "whole"
    assert train(*arguments, output=whole)[0] == 0
    interrupt(4)
    assert train(*arguments)[0] == 130
    code, _, err = train(*SHORT, *SMALL[:4], "--resume")
    assert code == 2 and "of another run: " in err and "from was '" in err
    assert train(*arguments, "--resume")[0] == 0
    first, second = (load_checkpoint(path).model.state_dict() for path in (whole, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert train(*arguments, "--resume")[0] == 0 and len(load_checkpoint(out).notes["from"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel-sizes", "4,2"], "--kernel-sizes is (4, 2), but the model of --from "),
        (["--n-hidden", "17"], "--n-hidden is 17, but the model of --from "),
        (["--gated"], "has False; leave --gated out"),
        (["--end", "$"], "--end is '$', but the model of --from "),
        (["-o", "trained.safetensors"], "this file is being read; give another one"),
        (["--from", "names.txt"], "--from names.txt: not a safetensors file"),
    ],
)
def test_options_that_contradict_the_checkpoint(train, trained, out, monkeypatch, arguments, message):
    monkeypatch.chdir(trained.parent)
    code, text, err = train("--from", trained.name, *arguments, "--n-embd", "6")
    assert (code, text) == (2, "") and message in err and not out.exists()


def test_a_list_with_other_characters_than_the_checkpoint(train, trained, listed, out):
    listed.write_text("\n".join(["ann", "anna"] * 10))
    code, _, err = train("--from", trained, *SHORT)
    assert code == 0 and load_checkpoint(out).vocab == load_checkpoint(trained).vocab  # fewer are no error
    listed.write_text(listed.read_text() + "\nzoë")
    code, _, err = train("--from", trained, *SHORT, "--overwrite")
    assert code == 2 and f"{listed}: the model of --from has no 'ë', but 'abc" in err


@pytest.mark.parametrize(("more", "said"), [([], ""), (["emma"], "2 of them repeated, ")])
def test_repeated_names_are_counted(train, listed, more, said):
    listed.write_text("\n".join(["emma", *(f"a{'b' * n}" for n in range(17)), *more, *more]))
    assert train(*SMALL)[2].startswith(f"{listed}: {18 + 2 * len(more)} names, {said}split ")


def test_host_names_from_list_to_names(train, run, listed, out):
    draw = random.Random(0)
    hosts = [f"{draw.choice(['www', 'db', 'mail'])}{draw.randrange(9)}.example.org" for _ in range(200)]
    listed.write_text("\n".join(hosts))
    code, _, err = train(*SMALL)
    assert code == 2 and "'.' marks the end of a name; remove it, or say another end with --end" in err
    assert train(*SMALL, "--end", "<E>")[0] == 2
    assert train(*SMALL, "--end", "$")[0] == 0
    vocab = load_checkpoint(out).vocab
    assert vocab == Vocabulary.from_names(hosts, end="$") and vocab.padding == "$"
    score, shown = Scorer.load(out, device="cpu").score(hosts[:1]).item(), ["--model", out, "--device", "cpu"]
    assert f"{score:.9g}" in run("score", listed, *shown, "--limit", 1)[1].decode()
    assert json.loads(run("explain", hosts[0], "--json", *shown)[1])["score"] == score
    (found,) = json.loads(run("complete", hosts[0], "--json", "--top", 1, *shown)[1])["names"]
    assert found["name"].startswith(hosts[0])
    characters = json.loads(run("next", "www", "--json", "--top", 99, *shown)[1])["next"]
    assert {entry["character"] for entry in characters} == {None, *"".join(hosts)}
    drawn = run("sample", "--prefix", "www.", "--novel", "--list", listed, "--count", 3, *shown)
    assert drawn[0] == 0 and all(line.startswith("www.") for line in drawn[1].decode().split())
    assert run("find-lr", listed, "--end", "$", "--steps", 2, "--batch-size", 9, "--device", "cpu")[0] == 0
    assert train("--from", out, *SHORT, "--end", "$", output=out.with_name("more"))[0] == 0
