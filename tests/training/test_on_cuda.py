"""A training on CUDA is near the CPU's: atomic sums come in any order, so no two have the same bits."""

import copy

import pytest
import torch

from wavenet_conv.training import Recipe, Trainer

SGD = {"optimizer": "sgd", "schedule": "constant", "lr": 0.1, "weight_decay": 0.0}
# How far a weight may be off after ten steps. With SGD a step adds lr * gradient, and a gradient of size 1 is a sum of
# some 1,000 terms: 10 * 0.1 * 1,000 * 2**-24 = 6e-5 in float32 and 1e-13 in float64. AdamW divides by a root of at
# least 1e-8, which magnifies that by up to 1e8. All with some room.
RECIPES = [(SGD, torch.float32, 1e-3), (SGD, torch.float64, 1e-10), ({"lr": 0.01}, torch.float64, 1e-4)]


@pytest.mark.parametrize("options, dtype, tolerance", RECIPES, ids=["sgd", "sgd in float64", "adamw in float64"])
@pytest.mark.parametrize("sizes", [{}, {"gated": True}], ids=["tanh", "gated"])
def test_it_is_near_the_cpus_in_float64(cuda, small, vocab, names, options, dtype, tolerance, sizes):
    """Also after it was resumed from a state."""
    model, lists = small(**sizes), (names[:200], names[200:260])
    recipe = Recipe(steps=10, batch_size=64, eval_every=5, ema_decay=0.8, **options)
    double, first, second = (
        Trainer(copy.deepcopy(model).to(device, kind), vocab, *lists, recipe)
        for device, kind in (("cpu", torch.float64), (cuda, dtype), (cuda, dtype))
    )
    for _ in range(4):
        first.advance()
    second.restore(*first.state())
    for trainer in (double, second):
        while not trainer.finished:
            trainer.advance()
    assert (torch.stack(second.losses).cpu() - torch.stack(double.losses)).abs().max() < tolerance
    assert abs(second.validate() - double.validate()) < tolerance
    for name, tensor in double.model.state_dict().items():
        assert (second.model.state_dict()[name].cpu() - tensor).abs().max() < tolerance, name


def test_teachers_expect_what_they_do_on_the_cpu(cuda, small, vocab, names):
    """Networks and n-grams, on the list and on the names that they draw."""
    recipe, corpora = Recipe(steps=2, batch_size=64, distill_weight=0.5, ngram_share=0.3, drawn=2), []
    for device in ("cpu", cuda):
        model, *teachers = (small(seed, torch.float64).to(device) for seed in (0, 1, 2))
        trainer = Trainer(model, vocab, names[:50], names[50:60], recipe, [teacher.eval() for teacher in teachers])
        while not trainer.finished:
            trainer.advance()
        corpora.append((trainer.corpus, torch.stack(trainer.losses)))
    (expected, losses), (found, losses_there) = corpora
    assert found.next_tokens.tolist() == expected.next_tokens.tolist()
    assert (found.soft_targets.cpu() - expected.soft_targets).abs().max() < 1e-12
    assert (losses_there.cpu() - losses).abs().max() < 1e-10
