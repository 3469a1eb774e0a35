"""`wavenet-conv find-lr`: one step at each rate, the rate of the lowest row, and an end where the loss explodes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from wavenet_conv import WaveNetConfig
from wavenet_conv.cli import find_lr as command
from wavenet_conv.cli.find_lr import try_rates
from wavenet_conv.training import Recipe, Trainer, new_model, total_loss


@pytest.fixture
def find_lr(run, names, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(names[:300]))

    def call(*arguments):
        code, printed, err = run("find-lr", path, "--device", "cpu", *arguments)
        return code, printed.decode(), err

    return call


def trainer_of(names, vocab, steps):
    model = new_model(WaveNetConfig(n_embd=4, n_hidden=8), dtype=torch.float64)
    recipe = Recipe(steps=steps, batch_size=16, optimizer="sgd", schedule="constant", weight_decay=0.0)
    return Trainer(model, vocab, names[:100], names[100:110], recipe)


def test_each_step_has_its_rate(names, vocab):
    found, by_hand = trainer_of(names, vocab, 30), trainer_of(names, vocab, 30)
    rows = list(try_rates(found))
    losses = []
    for step in range(30):
        batch = by_hand.train_corpus.batch(by_hand.next_rows())
        loss = total_loss(by_hand.model, batch) / batch.positions
        by_hand.model.zero_grad()
        loss.backward()
        for parameter in by_hand.model.parameters():
            parameter.data -= 10 ** (-3 + 3 * step / 29) * parameter.grad
        losses.append(float(loss.detach()))
        by_hand.step += 1
    assert (torch.stack(found.losses) - torch.tensor(losses, dtype=torch.float64)).abs().max() < 1e-10
    assert len(rows) == 15 and abs(rows[2][1] - (losses[4] + losses[5]) / 2) < 1e-10
    assert abs(rows[2][0] - 10 ** (-3 + 3 * 4.5 / 29)) < 1e-10


def test_the_suggestion_is_the_rate_of_the_lowest_row(find_lr, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    plot, arguments = tmp_path / "lr.png", ("--steps", 60, "--batch-size", 32, "--seed", 3)
    code, out, err = find_lr(*arguments, "--plot", plot)
    assert (code, err) == (0, "") and plot.read_bytes().startswith(b"\x89PNG")
    lines = out.splitlines()
    table = [tuple(map(float, line.split())) for line in lines[1:21]]
    rate, loss = min(table, key=lambda row: row[1])
    assert lines[21].startswith(f"suggestion: --lr {rate:.2g}, where the loss is lowest ({loss:.4f} nats)")
    assert 0.002 < rate < 0.5 and table[0][1] > 3 > loss
    results = json.loads(find_lr(*arguments, "--json")[1])
    assert [f"{loss:.4f}" for _, loss in results["rows"]] == [f"{row[1]:.4f}" for row in table]
    assert results["suggestion"] == results["rows"][table.index((rate, loss))][0]
    assert (results["steps"], results["steps_taken"]) == (60, 60)


def test_an_explosion_ends_it_early_and_is_normal(find_lr, monkeypatch):
    monkeypatch.setattr(command, "EXPONENTS", (-3.0, 6.0))
    code, out, err = find_lr("--steps", "100", "--batch-size", "32", "--optimizer", "sgd")
    assert (code, err) == (0, "") and "of 100 steps: the loss exploded\nsuggestion: --lr " in out
    assert len(out.splitlines()) < 20


def test_nan_is_an_explosion_and_nothing_else_a_failure(find_lr, names, vocab, monkeypatch):
    trainer, rows = trainer_of(names, vocab, 40), []
    for row in try_rates(trainer):
        rows.append(row)
        if len(rows) == 3:
            trainer.model.head.bias.data[0] = math.nan
    assert len(rows) == 4 and math.isnan(rows[3][1])
    monkeypatch.setattr(command, "try_rates", lambda trainer: [(0.1, math.nan)])
    code, _, err = find_lr()
    assert code == 1 and "no learning rate gave a finite loss; try another --preset or --batch-size" in err


def test_presets_with_teachers_are_tried_without_drawn_names(find_lr):
    code, out, _ = find_lr("--steps", 20, "--batch-size", 32, "--preset", "wide", "--json")
    assert code == 0 and json.loads(out)["steps"] == 20
