"""The rivals that are networks: every kind against its plain definition, and how they are trained."""

from dataclasses import replace
from itertools import islice
from math import inf

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from benchmarks.methods import parameters
from benchmarks.networks import NETWORKS, Transformer, batches, fit, new_network, new_optimizer
from wavenet_conv import Vocabulary, WaveNetConfig
from wavenet_conv.errors import TrainingError
from wavenet_conv.names import read_names
from wavenet_conv.training import PRESETS, Recipe, Trainer, new_model, split_names

TRAIN, VALID, _ = split_names(read_names(ROOT / "names.txt")[::150])
VOCAB = Vocabulary("abcdefghijklmnopqrstuvwxyz")
SMALL = [name for name in NETWORKS if name.endswith("-76k")]
LONGEST = 15
SOME = ["emma", "", "bo", "annabella", "christopherjohn"]


def network_of(name, seed=1, dropout=0.5):
    return new_network(name, VOCAB, LONGEST, seed, dropout)


@pytest.fixture(params=SMALL)
def network(request):
    """One of each kind in evaluation mode, so that its dropout must not show."""
    with torch.no_grad():
        yield network_of(request.param).eval()


def logits_of(network, name):
    """The definition: `(positions, vocab)` of one name, without packing or padding."""
    x = network.embedding(VOCAB.encode([name], context=1)[0])
    if isinstance(network, Transformer):
        size = x.shape[1]
        x = network.body(x + network.positions.weight[:size], mask=torch.ones(size, size).triu(1) > 0)
    else:
        x, _ = network.body(x)
    return network.head(x)[0]


def log_probs_of(network, name):
    return logits_of(network, name).log_softmax(1)[
        range(len(name) + 1), [*VOCAB.encode([name], context=1)[0][0, 1:], 0]
    ]


def loss_of(network, names):
    return -float(network.score(names, 64).sum()) / sum(len(name) + 1 for name in names)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_as_large_as_a_preset(name):
    shape, _ = PRESETS["fast" if name.endswith("-76k") else "gated"]
    ours = new_model(WaveNetConfig(vocab_size=len(VOCAB), **shape))
    assert parameters(network_of(name)) == pytest.approx(parameters(ours), rel=0.03)


def test_scores_are_those_of_names_one_by_one(network):
    expected = [log_probs_of(network, name) for name in SOME]
    for batch_size in (1, 3, 10):
        assert network.score(SOME, batch_size) == pytest.approx([float(part.sum()) for part in expected], abs=1e-4)
        assert network.position_log_probs(SOME, batch_size) == pytest.approx(torch.cat(expected), abs=1e-5)
    assert network.exact_scores(SOME) == pytest.approx(network.score(SOME, 10), abs=1e-4)
    exact = network.double().score(SOME, 3)
    assert network.float().exact_scores(SOME) == pytest.approx(exact, abs=1e-10)


def test_steps_give_the_logits_of_the_whole_pass(network):
    names = ["annabella", "alexandra", "elizabeth"]
    tokens, _ = VOCAB.encode(names, context=1)
    state, found = (), []
    for token in tokens.unbind(1):
        logits, state = network.step(token, state)
        assert {len(part) for part in state} == {len(names)}
        found.append(logits)
    for logits, name in zip(torch.stack(found, 1), names):
        assert logits == pytest.approx(logits_of(network, name), abs=1e-5)


def test_names_can_end_between_steps(network):
    """Who draws names drops the rows that ended from each part of the state, and goes on past the longest name."""
    tokens = torch.randint(1, len(VOCAB), (3, LONGEST + 10), generator=torch.Generator().manual_seed(1))
    state, whole, rows = (), (), [2, 0]
    for place, token in enumerate(tokens.unbind(1)):
        expected, whole = network.step(token, whole)
        if place == 5:
            state = tuple(part[rows] for part in state)
        logits, state = network.step(token[rows] if place >= 5 else token, state)
        assert logits == pytest.approx(expected[rows] if place >= 5 else expected, abs=1e-5)
        assert logits.isfinite().all()


def test_a_prediction_reads_what_came_before_and_all_of_it(network):
    network, name = network.double(), "annabellamarina"
    log_probs = network.position_log_probs([name], 1)
    for place in (0, 7, 14):
        changed = network.position_log_probs([f"{name[:place]}z{name[place + 1 :]}"], 1) - log_probs
        assert (changed.abs() > 1e-10).tolist() == [index >= place for index in range(len(name) + 1)]


def test_padding_changes_nothing(network):
    tokens, lengths = VOCAB.encode(["emma", "bo"], context=1)
    found = network.position_nats(tokens, lengths)
    assert found.shape == (2, 5) and not found[1, 3:].any()
    assert network.nats(tokens, lengths) == pytest.approx(found.sum(1))
    assert torch.equal(network.position_nats(F.pad(tokens, (0, 2 * LONGEST)), lengths), found)


@pytest.mark.parametrize("name", SMALL[:3])
def test_packing_changes_nothing(name):
    network = new_network(name, VOCAB, LONGEST, 1, 0.0)
    tokens, lengths = VOCAB.encode(SOME, context=1)
    found, expected = network.train().position_nats(tokens, lengths), network.eval().position_nats(tokens, lengths)
    assert found.detach() == pytest.approx(expected.detach(), abs=1e-5)


def test_dropout_is_of_training_alone(network):
    tokens, lengths = VOCAB.encode(SOME, context=1)
    assert torch.equal(network.nats(tokens, lengths), network.nats(tokens, lengths))
    network.train()
    assert not torch.equal(network.nats(tokens, lengths), network.nats(tokens, lengths))


@pytest.mark.parametrize("part", ["body", "head"])
@pytest.mark.parametrize("name", SMALL[:3])
def test_dropout_hides_half_of_what_a_recurrent_network_and_its_head_read(name, part):
    network, read = network_of(name, dropout=0.5), []
    getattr(network, part).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    network.nats(*VOCAB.encode(TRAIN[:50], context=1))
    (x,) = (getattr(x, "data", x) for x in read)
    assert float((x == 0).double().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", SMALL)
def test_a_network_learns_and_a_seed_gives_the_same_bits(name):
    recipe, trained = Recipe(steps=30, batch_size=64, eval_every=10, seed=3), []
    for global_seed, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        network = network_of(name, seed, dropout=0.1)
        start = loss_of(network.eval(), VALID)
        found = fit(network, TRAIN, VALID, replace(recipe, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        assert not network.training and found.steps == 30 and found.seconds > 0
        assert found.best_loss == pytest.approx(loss_of(network, VALID), rel=1e-6) and found.best_loss < start - 0.3
        trained.append(network.state_dict())
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])
    assert not any(torch.equal(trained[0][key], trained[2][key]) for key in ("embedding.weight", "head.bias"))


def test_steps_are_taken_in_training_mode_and_validations_in_evaluation_mode(monkeypatch):
    network, modes = network_of("gru-76k"), []
    nats = network.nats
    monkeypatch.setattr(network, "nats", lambda *args: modes.append(network.training) or nats(*args))
    with torch.no_grad():  # as in a benchmark
        found = fit(network, TRAIN, VALID, Recipe(steps=5, eval_every=2))
    assert modes == [True, True, False, True, True, False, True, False] and found.best_loss < 3.2


@pytest.mark.parametrize("name", SMALL)
def test_the_weights_with_the_lowest_validation_loss_are_kept(name):
    losses = {}
    for every in (1, 10):  # what is learned is wrong for the validation part, and more so with each step
        network = network_of(name, dropout=0.0)
        found = fit(network, ["ab"] * 32, ["zzzz"], Recipe(steps=10, batch_size=32, eval_every=every))
        losses[found.best_step] = found.best_loss
        assert found.best_loss == pytest.approx(loss_of(network, ["zzzz"]), rel=1e-6)
    assert len(losses) == 2 and losses[10] == max(losses.values())


def test_a_recipe_is_followed_as_a_trainer_follows_it():
    recipe = Recipe(steps=12, batch_size=100, warmup=0.25, weight_decay=0.3, seed=5)
    trainer = Trainer(new_model(WaveNetConfig(vocab_size=len(VOCAB))), VOCAB, TRAIN, VALID, recipe)
    optimizer, schedule = new_optimizer(network_of("gru-76k"), recipe)
    for rows in islice(batches(len(TRAIN), recipe), recipe.steps):
        assert torch.equal(rows, trainer.next_rows())
        for ours, theirs in zip(optimizer.param_groups, trainer.optimizer.param_groups):
            assert all(ours[key] == value for key, value in theirs.items() if key != "params")
        optimizer.step()
        schedule.step()
        trainer.advance()


@pytest.mark.parametrize("name", SMALL)
def test_only_matrices_of_the_body_and_of_the_head_are_decayed(name):
    network = network_of(name)
    optimizer, _ = new_optimizer(network, Recipe(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {key for key, p in network.named_parameters() if decay[id(p)]}
    expected = {key for key, p in network.named_parameters() if p.ndim == 2 and key.startswith(("body", "head"))}
    assert (
        decayed == expected
        and {"embedding.weight", "head.bias"}.isdisjoint(decayed)
        and set(decay.values()) == {0, 0.3}
    )


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_trainings_end(steps):
    assert fit(network_of("gru-76k"), TRAIN, VALID, Recipe(steps=steps)).best_loss < inf


def test_a_training_that_breaks_down_says_so():
    with pytest.raises(TrainingError, match=r"by step 2 with a learning rate up to 1e\+38: .* is nan; try a lower one"):
        fit(network_of("transformer-76k"), TRAIN, VALID, Recipe(steps=4, lr=1e38, eval_every=2))
