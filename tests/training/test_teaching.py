"""Teachers: n-grams on arrays against the table that defines them, the mean of all teachers, and drawn names."""

from __future__ import annotations

from dataclasses import asdict, replace

import hypothesis.strategies as st
import pytest
import torch
from helpers import ALPHABET
from hypothesis import given

from reference.ngram import END, KneserNey
from wavenet_conv import Vocabulary, WaveNetConvError, load_checkpoint, sample
from wavenet_conv.recipe import PRESETS, Recipe, teachers_of
from wavenet_conv.training import Corpus, Trainer, fit, predictions
from wavenet_conv.training.ngrams import NGrams, cross_fitted, discounts_of, predicted
from wavenet_conv.training.teaching import Teaching

LISTS = st.lists(st.text("ab", max_size=6), min_size=1, max_size=30)
VOCAB = Vocabulary("abc")


def table(counted, names, vocab, order):
    """What `reference.ngram` gives at each position of the names, in the order of the vocabulary's tokens."""
    model = KneserNey(counted, vocab.characters, order)
    tokens = [END if token == vocab.end else vocab.decode([token]) for token in range(len(vocab))]
    rows = [
        [model.prob((END + name)[:place], t) for t in tokens] for name in names for place in range(1, len(name) + 2)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@given(LISTS, st.lists(st.text("abc", max_size=6), min_size=1, max_size=5), st.integers(1, 9))
def test_predictions_are_those_of_the_table(counted, names, order):
    """Also of names with a character, and after contexts, that no counted name has."""
    found = predicted(names, counted, VOCAB, order)
    assert (found - table(counted, names, VOCAB, order)).abs().max() < 1e-12
    assert (found.sum(1) - 1).abs().max() < 1e-12


@given(st.lists(st.integers(0, 6), max_size=60))
def test_discounts_are_those_of_the_table(counts):
    from reference.ngram import discounts_of as expected

    found = discounts_of(torch.tensor(counts, dtype=torch.int64))
    assert found.tolist() == pytest.approx(expected(count for count in counts if count), abs=1e-15)


def test_longer_counts_use_the_notebooks_own_numbers(names):
    vocab = Vocabulary.from_mapping({**{c: i for i, c in enumerate(reversed(ALPHABET))}, ".": 26})
    assert vocab.end == 26
    found = predicted(names[300:320], names[:300], vocab)
    assert (found - table(names[:300], names[300:320], vocab, 6)).abs().max() < 1e-12


@pytest.mark.parametrize("count", [2, 7, 25])
def test_each_name_is_predicted_by_the_other_folds(names, vocab, count):
    names, folds = names[:count], min(10, count)
    found = cross_fitted(names, vocab).split([len(name) + 1 for name in names])
    for index, name in enumerate(names):
        others = [other for place, other in enumerate(names) if place % folds != index % folds]
        assert (found[index] - table(others, [name], vocab, 6)).abs().max() < 1e-12


def test_a_list_of_one_name_predicts_itself(vocab):
    assert (cross_fitted(["emma"], vocab) - table(["emma"], ["emma"], vocab, 6)).abs().max() < 1e-12


def test_what_is_counted_is_what_the_mask_says(names, vocab):
    grams, counted = NGrams(names[:40], vocab, 4), torch.arange(40) % 3 == 0
    found = grams.predictions(counted, torch.arange(40) == 5)
    assert (found - table(names[:40:3], [names[5]], vocab, 4)).abs().max() < 1e-12


@pytest.fixture
def teachers(small):
    return [small(1, torch.float64).eval(), small(2, torch.float64, gated=True, kernel_sizes=(3, 2)).eval()]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_targets_are_the_mean_of_the_networks_and_the_share_of_the_n_grams(small, teachers, names, vocab, share):
    student = small(0, torch.float64)
    found = Teaching(names[:50], vocab, Recipe(ngram_share=share), teachers, student).corpus.soft_targets
    networks = sum(predictions(teacher, Corpus(names[:50], vocab, teacher)) for teacher in teachers) / 2
    assert (found - (1 - share) * networks - share * cross_fitted(names[:50], vocab)).abs().max() < 1e-12
    if share:  # without networks n-grams have all of it
        alone = Teaching(names[:50], vocab, Recipe(ngram_share=share), [], student).corpus.soft_targets
        assert (alone - cross_fitted(names[:50], vocab)).abs().max() < 1e-12


def test_without_teachers_there_are_no_soft_targets(small, names, vocab):
    teaching = Teaching(names[:50], vocab, Recipe(), [], small())
    assert teaching.corpus.soft_targets is None and teaching.corpus_of(3) is teaching.corpus


def decoded(corpus, vocab, first):
    """The names of a corpus from the one numbered `first` on, from what follows each window."""
    starts, ends = corpus.first[first:], corpus.first[first:] + corpus.outputs[first:]
    return [vocab.decode(corpus.next_tokens[a : b - 1].tolist()) for a, b in zip(starts, ends)]


def test_the_networks_draw_the_names_of_an_epoch(small, teachers, names, vocab):
    recipe, listed = Recipe(ngram_share=0.5, drawn=2, seed=7), names[:25]
    teaching = Teaching(listed, vocab, recipe, teachers, small(0, torch.float64))
    corpora = [teaching.corpus_of(epoch) for epoch in (0, 1, 0)]
    seed = (7 * 1_000_003 + 1) * 2
    drawn = [name for place, teacher in enumerate(teachers) for name in sample(teacher, vocab, 25, seed=seed + place)]
    assert decoded(corpora[1], vocab, 0) == listed + drawn
    assert decoded(corpora[0], vocab, 25) == decoded(corpora[2], vocab, 25) != drawn
    networks = sum(predictions(teacher, Corpus(drawn, vocab, teacher)) for teacher in teachers) / 2
    before = len(teaching.corpus.soft_targets)
    assert torch.equal(corpora[1].soft_targets[:before], teaching.corpus.soft_targets)
    expected = networks / 2 + predicted(drawn, listed, vocab) / 2
    assert (corpora[1].soft_targets[before:] - expected).abs().max() < 1e-12


def test_an_odd_count_is_shared_among_the_networks(small, teachers, names, vocab):
    teaching = Teaching(names[:25], vocab, Recipe(drawn=1), teachers, small())
    assert len(teaching.corpus_of(0)) == 50


def test_an_epoch_is_the_list_and_the_drawn_names_once_each(small, teachers, names, vocab):
    recipe = Recipe(steps=8, batch_size=16, drawn=1, distill_weight=0.5)
    trainer = Trainer(small(), vocab, names[:25], names[25:30], recipe, teachers)
    seen, corpora = [], []
    for _ in range(8):
        seen.append(trainer.next_rows().tolist())
        corpora.append(trainer.corpus)
        trainer.advance()
    assert [len(rows) for rows in seen] == [16, 16, 16, 2] * 2
    for part in (seen[:4], seen[4:]):
        assert sorted(row for rows in part for row in rows) == list(range(50))
    assert corpora[0] is corpora[3] is not corpora[4] is corpora[7] and len(trainer.train_corpus) == 25


def test_a_restored_training_draws_the_same_names(small, teachers, names, vocab):
    recipe, lists = Recipe(steps=10, batch_size=16, eval_every=3, drawn=1, ngram_share=0.3), (names[:25], names[25:60])
    whole = fit(small(), vocab, *lists, recipe, teachers=teachers)
    first = Trainer(small(), vocab, *lists, recipe, teachers)
    for _ in range(6):
        first.advance()
    other = Trainer(small(5), vocab, *lists, recipe, teachers)
    tensors, numbers = first.state()
    other.restore({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    while not other.finished:
        other.advance()
    assert torch.equal(torch.stack(whole.losses), torch.stack(other.losses))


def test_n_grams_lower_the_loss_on_other_names(small, names, vocab):
    lists, recipe = (names[:2000], names[2000:2400]), Recipe(steps=200, batch_size=128, eval_every=50)
    alone = fit(small(), vocab, *lists, recipe).best_loss
    taught = fit(small(), vocab, *lists, replace(recipe, ngram_share=1.0, distill_weight=0.5)).best_loss
    assert taught < alone


@pytest.mark.parametrize("preset", ["fast", "wide", "gated"])
def test_n_grams_teach_in_the_presets(small, names, vocab, preset):
    recipe = replace(PRESETS[preset][1], drawn=0)
    assert Trainer(small(), vocab, names[:25], names[25:30], recipe).train_corpus.soft_targets is not None
    alone = Trainer(small(), vocab, names[:25], names[25:30], replace(recipe, distill_weight=0.0))
    assert alone.train_corpus.soft_targets is None


def test_names_are_drawn_without_a_share_of_the_targets_too(small, teachers, names, vocab):
    recipe = Recipe(steps=3, batch_size=16, drawn=1, distill_weight=0.0)
    trainer = Trainer(small(), vocab, names[:25], names[25:30], recipe, teachers)
    trainer.advance()
    assert len(trainer.corpus) == 50 and trainer.corpus.soft_targets is None


def test_errors_name_the_fix(small, teachers, names, vocab):
    with pytest.raises(WaveNetConvError, match="drawn names need a network to draw them; give teachers, or set drawn"):
        Teaching(names[:25], vocab, Recipe(drawn=1), [], small())
    with pytest.raises(WaveNetConvError, match="a teacher is in training mode; call .eval"):
        Teaching(names[:25], vocab, Recipe(), [teachers[0].train()], small())
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(WaveNetConvError, match="ngram_share is .*; it must be from 0 to 1"):
            Recipe(ngram_share=value)
    with pytest.raises(WaveNetConvError, match="drawn is -1; it must be at least 0"):
        Recipe(drawn=-1)


def test_the_notes_of_the_default_model_are_its_presets():
    """Otherwise the command in CONTRIBUTING.md would make another."""
    (_, recipe), notes = PRESETS["wide"], load_checkpoint("default").notes
    assert notes["preset"] == "wide" and asdict(recipe).items() <= notes.items()
    assert notes["teachers"] == [f"{name}, seed {own.seed}" for name, _, own in teachers_of("wide", recipe.seed)]
