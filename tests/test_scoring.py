"""Scores are the tree's log-likelihoods, and a name's score has the same bits in any company."""

import random
from math import log

import hypothesis.strategies as st
import pytest
import torch
from conftest import random_tree
from hypothesis import given, settings
from helpers import to_exact

import reference
from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, WaveNetConvError, from_tree, kernels, scoring
from wavenet_conv.nodes import SharedNodes
from wavenet_conv.scoring import Scorer

ABC = Vocabulary("abcdefghijklmnopqrstuvwxyz")
NAMES = ["emma", "", "olivia", "a", "xqzvkj", "maximiliano", "emma"]


def tree_log_probs(tree, names, vocab):
    """Log-probabilities of every position by the tree, name after name, and each name's sum."""
    context = reference.context_of(tree)
    values = []
    for length in sorted({len(name) for name in names}):
        rows = [index for index, name in enumerate(names) if len(name) == length]
        tokens, _ = vocab.encode([names[row] for row in rows], context=context)
        with torch.no_grad():
            log_probs = reference.window_logits(tree, tokens).log_softmax(-1)
        targets = torch.cat([tokens[:, context:], tokens.new_zeros(len(rows), 1)], 1)
        values += zip(rows, log_probs.gather(2, targets[..., None])[..., 0])
    ordered = [value for _, value in sorted(values, key=lambda item: item[0])]
    return torch.cat(ordered), torch.stack([value.sum() for value in ordered])


def equal_to_1e_5_per_position(scores, sums, names):
    positions = torch.tensor([len(name) + 1 for name in names])
    return scores.dtype == torch.float32 and bool(((scores - sums).abs() < 1e-5 * positions).all())


def small_scorer(dtype=torch.float32, gated=False, **options):
    return Scorer(from_tree(random_tree(n_embd=6, n_hidden=16, dtype=dtype, gated=gated)), ABC, **options)


@pytest.mark.parametrize(
    ("kernel_sizes", "gated"), [((2, 2, 2), False), ((3,), False), ((3, 2, 2), False), ((2, 3), True)]
)
def test_float64_scores_are_the_trees(names, vocab, device, kernel_sizes, gated):
    tree, names = (
        random_tree(kernel_sizes, n_embd=24, n_hidden=64, gated=gated),
        names[:: 1 if kernel_sizes == (2, 2, 2) else 8],
    )
    scorer = Scorer(from_tree(tree), vocab, device=device)
    values, offsets = scorer.position_log_probs(names)
    expected, sums = tree_log_probs(tree, names, vocab)
    assert values.dtype == torch.float64 and offsets[-1] == len(values) == len(expected)
    assert (values - expected).abs().max() < 1e-12
    assert torch.equal(offsets.diff(), torch.tensor([len(name) + 1 for name in names]))
    assert (scorer.score(names) - sums).abs().max() < 1e-11  # up to 20 positions


def test_the_lectures_list_in_float64_and_float32(lecture_list):
    vocab = Vocabulary.from_names(lecture_list)
    tree = random_tree()
    expected, sums = tree_log_probs(tree, lecture_list, vocab)
    assert (Scorer(from_tree(tree), vocab).position_log_probs(lecture_list)[0] - expected).abs().max() < 1e-12
    scores = Scorer(from_tree(tree), vocab, dtype=torch.float32).score(lecture_list)
    assert equal_to_1e_5_per_position(scores, sums, lecture_list)


@pytest.mark.parametrize("sizes", [{}, {"n_hidden": 32, "gated": True}], ids=str)
def test_float32_scores_of_the_default_list(names, vocab, device, sizes):
    tree, names = random_tree(**sizes), names[:: 8 if sizes else 2]
    scores = Scorer(from_tree(tree), vocab, dtype=torch.float32, device=device).score(names)
    assert equal_to_1e_5_per_position(scores, tree_log_probs(tree, names, vocab)[1], names)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3, 2), (1, 4, 1, 2)])
def test_logits_to_the_bit_where_arithmetic_is_exact(names, vocab, clamp_for_tanh, kernel_sizes, gated):  # noqa: F811
    tree = to_exact(random_tree(kernel_sizes, n_embd=6, n_hidden=16, gated=gated))
    logits, offsets = Scorer(from_tree(tree), vocab).logits(names[::20])
    for name, start, end in zip(names[::20], offsets[:-1], offsets[1:]):
        tokens, _ = vocab.encode([name], context=reference.context_of(tree))
        with torch.no_grad():
            assert torch.equal(logits[start:end], reference.window_logits(tree, tokens)[0])


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.text("abcxyz", max_size=9), max_size=30), min_size=12, max_size=12),
    st.integers(1, 50),
    st.sampled_from([False, False, False, False, True]),
)
def test_company_does_not_matter(batches, chunk, gated):
    """1,200 random batches in all, against each name alone."""
    alone, scorer = ALONE[gated], COMPANY[gated]
    for batch in batches:
        scores = torch.cat([torch.zeros(0), *scorer.stream(batch, chunk=chunk)])
        for name, score in zip(batch, scores):
            if name not in alone:
                alone[name] = scorer.score([name])[0]
            assert torch.equal(score, alone[name]), name


COMPANY = {gated: small_scorer(gated=gated) for gated in (False, True)}
ALONE: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}  # scores of names scored one by one


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kernel_sizes", "widths"),
    [
        *[(kernel_sizes, dict(n_embd=24, n_hidden=128)) for kernel_sizes in ((2, 2, 2), (8,), (3,), (5, 3))],
        ((2, 2, 2), dict(n_embd=9, n_hidden=(9, 10, 11))),
        ((2, 2, 2), dict(n_embd=9, n_hidden=(7, 40, 9), gated=True)),
        ((2, 2, 2), dict(n_embd=48, n_hidden=40, gated=True)),
    ],
    ids=str,
)
def test_company_does_not_matter_in_a_real_list(names, device, threads, kernel_sizes, widths):
    """Widths of the lecture's size, where a matrix product has other kernels for other shapes, and narrow ones."""
    tree = random_tree(kernel_sizes, **widths, dtype=torch.float32)
    scorer = Scorer(from_tree(tree), ABC, device=device, remember=kernel_sizes == (2, 2, 2))
    scores = scorer.score(names)
    order = random.Random(0)
    for size in (1, 2, 3, 7, 64, 500, 511, 512, 513, 5000, len(names)):
        chosen = order.sample(range(len(names)), size)
        assert torch.equal(scorer.score([names[i] for i in chosen]), scores[chosen]), size
    assert torch.equal(torch.cat(list(scorer.stream(names, chunk=999))), scores)


def test_every_way_to_ask_gives_the_same_scores():
    scorer = small_scorer()
    scores = scorer.score(NAMES)
    assert scores.shape == (7,) and scores.dtype == torch.float32 and scores[0] == scores[-1]
    assert torch.equal(scorer.score(iter(NAMES)), scores)
    assert torch.equal(scorer.score(ABC.encode(NAMES, context=8)), scores)
    assert torch.equal(torch.cat(list(scorer.stream(name for name in NAMES))), scores)
    assert [len(part) for part in scorer.stream(NAMES, chunk=3)] == [3, 3, 1]
    values, offsets = scorer.position_log_probs(NAMES)
    sums = torch.stack([part.double().sum() for part in values.tensor_split(offsets[1:-1])])
    assert torch.equal(sums.float(), scores)
    logits, same = scorer.logits(NAMES)
    assert torch.equal(same, offsets)
    targets = torch.cat([torch.tensor([ABC.characters.index(c) + 1 for c in name] + [0]) for name in NAMES])
    assert torch.equal(logits.log_softmax(1).gather(1, targets[:, None])[:, 0], values)
    bits = scorer.bits_per_character(NAMES)
    assert torch.allclose(bits, -scores / log(2) / torch.tensor([len(name) + 1 for name in NAMES]))


def test_the_model_is_copied_and_its_mode_does_not_matter():
    conv = from_tree(random_tree(n_embd=6, n_hidden=16, dtype=torch.float32)).train()
    scorer = Scorer(conv, ABC)
    scores = scorer.score(NAMES)
    conv.head.bias.data += 1
    assert torch.equal(scorer.score(NAMES), scores) and conv.training
    assert torch.equal(scores, small_scorer().score(NAMES))
    assert Scorer(conv, ABC, dtype=torch.float64).score(NAMES).dtype == torch.float64


def test_percentiles():
    scorer = small_scorer(quantiles=torch.tensor([1.0, 2.0, 3.0, 100.0]))
    bits = scorer.bits_per_character(NAMES)
    expected = [25.0 * sum(q < b for q in (1, 2, 3, 100)) for b in bits.tolist()]
    assert scorer.percentile(NAMES).tolist() == expected
    assert scorer.percentile(["a-b"], unknown="nan").isnan().all()
    with pytest.raises(WaveNetConvError, match="carries no quantiles"):
        small_scorer().percentile(NAMES)


def test_no_names_and_empty_names():
    scorer = small_scorer()
    assert scorer.score([]).shape == (0,) and list(scorer.stream([])) == []
    values, offsets = scorer.position_log_probs([])
    assert values.shape == (0,) and offsets.tolist() == [0]
    assert scorer.logits([])[0].shape == (0, 27)
    assert scorer.score(ABC.encode([], context=8)).shape == (0,)
    assert scorer.score(["", ""]).isfinite().all() and scorer.position_log_probs([""])[1].tolist() == [0, 1]


@pytest.mark.parametrize("gated", [False, True])
def test_what_a_call_remembers_is_whole(names, monkeypatch, gated):
    """A call that fails between numbering and evaluating leaves no number of a node that has no value."""
    scorer, fresh = small_scorer(remember=True, gated=gated), small_scorer(gated=gated)
    expected = fresh.score(names)
    assert torch.equal(scorer.score(names[:3000]), expected[:3000])
    evaluate = SharedNodes._contributions
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SharedNodes, "_contributions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        scorer.score(names[3000:6000])
    assert torch.equal(scorer.score(names), expected)
    with monkeypatch.context() as patch:
        counts = []
        patch.setattr(SharedNodes, "_contributions", lambda *args: [counts.append(args[3]), evaluate(*args)][1])
        assert torch.equal(scorer.score(names), expected) and torch.equal(fresh.score(names), expected)
    assert counts[0] == 0 < counts[1]


def test_a_name_of_100_000_characters_among_others(monkeypatch):
    scorer = small_scorer()
    long_name = "".join(random.Random(0).choices("abcdefghij", k=100_000))
    alone = scorer.score([long_name])
    assert alone.isfinite().all()
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 1000)
    mixed = scorer.score([*NAMES, long_name, *NAMES])
    assert torch.equal(mixed, torch.cat([scorer.score(NAMES), alone, scorer.score(NAMES)]))


@pytest.mark.parametrize("character", ["7", ".", "\n", "\0", "é", "\U0001f600", "\ud800"])
def test_unknown_characters(character):
    scorer = small_scorer()
    names = ["emma", f"an{character}a", "ava"]
    with pytest.raises(WaveNetConvError, match="name 1 .*at position 2 is not in the vocabulary"):
        scorer.score(names)
    scores = scorer.score(names, unknown="nan")
    assert scores.isnan().tolist() == [False, True, False]
    assert torch.equal(scores[::2], scorer.score(["emma", "ava"]))
    values, offsets = scorer.position_log_probs(names, unknown="nan")
    assert offsets.tolist() == [0, 5, 6, 10] and values.isnan().sum() == 1 and values[5].isnan()
    with pytest.raises(WaveNetConvError, match="unknown is 'skip'; it is 'error' or 'nan'"):
        scorer.score(names, unknown="skip")


def test_a_generator_that_raises_in_the_middle():
    def names():
        yield from ["emma", "ava", "mia"]
        raise KeyError("the source broke")

    scorer, seen = small_scorer(), []
    with pytest.raises(KeyError, match="the source broke"):
        for scores in scorer.stream(names(), chunk=2):
            seen.append(scores)
    assert torch.equal(torch.cat(seen), scorer.score(["emma", "ava"]))
    assert scorer.score(["mia"]).isfinite().all()


def test_other_vocabularies(names):
    for characters in ("é-ß😀z", "".join(chr(0x4E00 + i) for i in range(300))):
        vocab = Vocabulary(characters)
        tree = random_tree(n_embd=6, n_hidden=16, vocab_size=len(vocab))
        strings = ["".join(random.Random(i).choices(characters, k=i % 7)) for i in range(50)]
        scores = Scorer(from_tree(tree), vocab).score(strings)
        assert (scores - tree_log_probs(tree, strings, vocab)[1]).abs().max() < 1e-12


def test_a_gated_model_takes_the_plain_path(monkeypatch):
    """The kernel's last layer is a tanh, which a gated one is not."""
    expected = small_scorer(gated=True).score(NAMES)
    monkeypatch.setattr(kernels, "usable", lambda *_: True)
    monkeypatch.setattr(kernels, "last_layer", lambda *_: pytest.fail("the kernel was asked"))
    assert torch.equal(small_scorer(gated=True).score(NAMES), expected)


def test_a_model_without_any_bias():
    conv = ConvWaveNet(WaveNetConfig(n_embd=6, n_hidden=20, batch_norm=False, bias=False), dtype=torch.float64).eval()
    tree = reference.from_conv(conv)
    assert (Scorer(conv, ABC).score(NAMES) - tree_log_probs(tree, NAMES, ABC)[1]).abs().max() < 1e-12


def test_what_is_no_list_of_names():
    scorer = small_scorer()
    with pytest.raises(WaveNetConvError, match="names is one string"):
        scorer.score("emma")
    with pytest.raises(WaveNetConvError, match="name 1 is 3"):
        scorer.score(["emma", 3])
    with pytest.raises(WaveNetConvError, match="names is None"):
        scorer.score(None)
    tokens, lengths = ABC.encode(NAMES, context=8)
    with pytest.raises(WaveNetConvError, match="are not what vocab.encode.names, context=8. makes"):
        scorer.score((tokens[:, 4:], lengths))
    with pytest.raises(IndexError, match=r"token 31 at \[0, 8\]"):
        scorer.score((tokens + 26, lengths))
    with pytest.raises(WaveNetConvError, match="the vocabulary has 3 tokens and the model 27"):
        Scorer(from_tree(random_tree(n_embd=6, n_hidden=16)), Vocabulary("ab"))
