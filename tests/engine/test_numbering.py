"""A model with a notebook's own numbers computes what the same model with the standard ones does."""

import hypothesis.strategies as st
import pytest
import torch
from engine.cases import BACKENDS, SMALL, random_conv, rejects, streamed
from helpers import ALPHABET, KINDS, numberings, random_tree, renumbered
from hypothesis import given, settings

import reference
from wavenet_conv import Scorer, Stream, Vocabulary, fold_batch_norm, from_tree, sample, sampling, verify
from wavenet_conv.engine.weights import fold
from wavenet_conv.scoring import training_quantiles

kinds = st.sampled_from(KINDS)
shapes = st.sampled_from([(2, 2, 2), (3,), (1, 2), (2, 1, 3)])


def pair(numbering, kernel_sizes=(2, 2, 2), **kind):
    """The tree with the notebook's numbers, its model and vocabulary, and the standard model and vocabulary."""
    vocab, order, _, _ = numbering
    tree = random_tree(kernel_sizes, **SMALL, **kind, vocab_size=len(vocab))
    vars(tree.layers[-1]).get("bias", vars(tree.layers[-1]).get("beta"))[0].data += 1.0  # names end
    other = renumbered(tree, order)
    return other, from_tree(other), vocab, from_tree(tree), Vocabulary(ALPHABET[: len(order) - 1])


@settings(max_examples=40)
@given(numberings(), shapes, kinds)
def test_scores_and_logits_are_those_of_the_standard_numbers(numbering, kernel_sizes, kind):
    _, order, names, standard = numbering
    tree, conv, vocab, same, letters = pair(numbering, kernel_sizes, **kind)
    scorer = Scorer(conv, vocab, quantiles=training_quantiles(conv, vocab, names))
    expected = Scorer(same, letters, quantiles=training_quantiles(same, letters, standard))
    tokens, lengths = vocab.encode(names, context=conv.context)
    for asked in (names, (tokens, lengths)):
        assert (scorer.score(asked) - expected.score(standard)).abs().max() < 1e-11  # up to 21 positions
        assert torch.equal(scorer.percentile(asked), expected.percentile(standard))
        values, _ = scorer.position_log_probs(asked)
        assert (values - expected.position_log_probs(standard)[0]).abs().max() < 1e-12
        logits, _ = scorer.logits(asked)
        assert (logits - expected.logits(standard)[0][:, order]).abs().max() < 1e-12
    assert torch.equal(torch.cat(list(scorer.stream(names, chunk=2))), scorer.score(names))
    following = [[*row[conv.context :][:length], vocab.end] for row, length in zip(tokens, lengths)]
    columns = torch.tensor([token for row in following for token in row])[:, None]
    assert (logits.log_softmax(1).gather(1, columns)[:, 0] - values).abs().max() < 1e-12
    for model in (conv, fold_batch_norm(conv)):
        assert verify(tree, model, names, vocab).equal


@settings(max_examples=40)
@given(numberings(), shapes, kinds, st.sampled_from([sampling.LONG, 0]), st.data())
def test_names_are_those_of_the_lectures_loop_with_its_numbers(numbering, kernel_sizes, kind, long, data):
    _, _, names, _ = numbering
    tree, conv, vocab, _, _ = pair(numbering, kernel_sizes, **kind)
    prefix = data.draw(st.sampled_from([names[0], ""]))
    rows = sampling.uniform(7, torch.arange(20)[:, None], torch.arange(25)).tolist()
    draw = reference.inverse_cdf(lambda name, position: rows[name][position])
    start = vocab.encode([prefix], context=1)[0][0, 1:].tolist()
    with torch.no_grad():
        drawn = reference.sample_loop(tree, 20, draw, prefix=start, max_length=25, end=vocab.end)
    alphabet = {vocab.encode([c], context=1)[0][0, 1].item(): c for c in vocab.characters}
    expected = ["".join(alphabet[token] for token in name) for name in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "LONG", long)
        assert sample(conv, vocab, 20, prefix=prefix, seed=7, max_length=25) == expected
        assert sample(conv, vocab, 5, prefix=prefix, seed=7, max_length=25, batch_size=2) == expected[:5]


@pytest.mark.parametrize("rows, compiled", BACKENDS)
@settings(max_examples=10)
@given(numberings(), shapes, kinds, st.data())
def test_a_stream_reads_and_gives_the_models_own_tokens(rows, compiled, numbering, kernel_sizes, kind, data):
    _, order, names, _ = numbering
    _, conv, vocab, same, _ = pair(numbering, kernel_sizes, **kind)
    compiled = compiled and fold(conv).only_tanh
    stream, other = Stream(conv, rows, compiled=compiled, end=vocab.end), Stream(same, rows, compiled=compiled)
    row = st.lists(st.sampled_from(order), min_size=6, max_size=6)
    tokens = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)))
    found, expected = streamed(stream, tokens), streamed(other, torch.tensor(order)[tokens])
    assert (found - expected[..., order]).abs().max() < 1e-12
    state = stream.state()
    logits = stream.step(tokens[:, 0])
    again = Stream(conv, rows, end=vocab.end)
    again.load_state(state)
    assert (again.step(tokens[:, 0]) - logits).abs().max() < 1e-12
    prefixes = (names * rows)[:rows]
    pushed = stream.push(*vocab.encode(prefixes, context=1))
    whole, lengths = vocab.encode(prefixes, context=conv.context)
    with torch.no_grad():
        expected = conv(whole)[torch.arange(rows), lengths]
    assert (pushed - expected).abs().max() < 1e-12


def test_an_end_that_is_no_token_and_a_state_of_another_end_are_rejected():
    conv = random_conv()
    for end in (27, -1, 1.0):
        assert rejects(f"end is {end}; it must be a token of the model, 0 to 26", Stream, conv, end=end)
    assert rejects("of another model", Stream(conv, end=3).load_state, Stream(conv).state())
    tokens, lengths = Vocabulary(ALPHABET).encode(["emma"], context=8)
    assert rejects("do not hold token 3 and then prefixes", Stream(conv, end=3).push, tokens, lengths)
