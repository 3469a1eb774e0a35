"""Scores are the tree's log-likelihoods, and a name's score has the same bits in any batch."""

import random
from math import log

import pytest
import torch
from engine.cases import ABC, outputs_of, random_conv, rejects
from helpers import LAYER_NORM, MIXED, random_tree

from wavenet_conv import Scorer, Stream, Vocabulary, from_tree, packing, sample

NAMES = ["emma", "", "olivia", "a", "xqzvkj", "maximiliano", "emma"]


def small_scorer(gated=False, kind=None, **options):
    return Scorer(random_conv(dtype=torch.float32, **(kind or {"gated": gated})), ABC, **options)


def assert_scores_are_the_trees(tree, names, vocab, device="cpu"):
    logits, targets = outputs_of(tree, names, vocab)
    expected = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    positions = torch.tensor([len(name) + 1 for name in names])
    sums = torch.stack([part.sum() for part in expected.split(positions.tolist())])
    scorer = Scorer(from_tree(tree), vocab, device=device)
    values, offsets = scorer.position_log_probs(names)
    assert values.dtype == torch.float64 and torch.equal(offsets.diff(), positions) and offsets[-1] == len(values)
    assert (values - expected).abs().max() < 1e-12
    assert (scorer.score(names) - sums).abs().max() < 1e-11  # up to 20 positions
    scores = Scorer(from_tree(tree), vocab, dtype=torch.float32, device=device).score(names)
    assert scores.dtype == torch.float32 and ((scores - sums).abs() < 1e-5 * positions).all()


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (3,), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", [{}, {"gated": True}, LAYER_NORM, MIXED], ids=["tanh", "gated", "layer", "mixed"])
def test_scores_are_the_trees(names, device, kernel_sizes, kind):
    tree = random_tree(kernel_sizes, n_embd=24, n_hidden=64, **kind)
    assert_scores_are_the_trees(tree, names[::100], ABC, device)


@pytest.mark.slow
def test_scores_of_the_lectures_list_are_the_trees(lecture_list):
    assert_scores_are_the_trees(random_tree(), lecture_list, Vocabulary.from_names(lecture_list))


@pytest.mark.parametrize("characters", ["é-ß😀z", "".join(chr(0x4E00 + i) for i in range(300))], ids=len)
def test_scores_in_other_vocabularies_are_the_trees(characters):
    names, vocab = ["".join(random.Random(i).choices(characters, k=i % 7)) for i in range(50)], Vocabulary(characters)
    assert_scores_are_the_trees(random_tree(n_embd=6, n_hidden=16, vocab_size=len(vocab)), names, vocab)


@pytest.mark.parametrize("options", [{}, {"remember": True}, {"compiled": False}], ids=str)
@pytest.mark.parametrize(
    "kernel_sizes, widths",
    [
        *[(kernel_sizes, dict(n_embd=24, n_hidden=128)) for kernel_sizes in ((2, 2, 2), (8,), (5, 3))],
        ((2, 2, 2), dict(n_embd=9, n_hidden=(9, 10, 11))),
        ((2, 2, 2), dict(n_embd=9, n_hidden=(7, 40, 9), gated=True)),
        ((2, 2, 2), dict(n_embd=48, n_hidden=40, gated=True)),
        ((2, 2, 2), dict(n_embd=21, n_hidden=17, dtype=torch.float64)),
        ((2, 2, 2), dict(n_embd=24, n_hidden=(128, 90, 7), **LAYER_NORM)),
        ((2, 2), dict(n_embd=9, n_hidden=(70, 128), **MIXED)),
    ],
    ids=str,
)
def test_a_name_has_the_same_bits_alone_and_in_any_batch_on_the_cpu(
    names, monkeypatch, threads, kernel_sizes, widths, options
):
    """Widths of the lecture's size, where a matrix product has other kernels for other shapes, and narrow ones."""
    names, order = [*names[::16], *NAMES, "", "a" * 50], random.Random(0)
    conv = random_conv(kernel_sizes, **{"dtype": torch.float32} | widths)
    scorer = Scorer(conv, ABC, **options)
    scores = scorer.score(names)
    for size in (*[1] * 20, 2, 3, 7, 64, 511, 512, 513, len(names)):
        chosen = order.sample(range(len(names)), size)
        assert torch.equal(scorer.score([names[i] for i in chosen]), scores[chosen]), size
    for chunk, count in ((1, 20), (7, 100), (999, len(names))):
        assert torch.equal(torch.cat(list(scorer.stream(names[-count:], chunk=chunk))), scores[-count:])
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 40)  # less than the last name
    assert torch.equal(scorer.score(names[-30:]), scores[-30:])


def test_every_way_to_ask_gives_the_same_scores():
    scorer = small_scorer()
    scores, encoded = scorer.score(NAMES), ABC.encode(NAMES, context=8)
    assert scores.shape == (7,) and scores.dtype == torch.float32 and scores[0] == scores[-1]
    assert torch.equal(scorer.score(iter(NAMES)), scores) and torch.equal(scorer.score(encoded), scores)
    assert [len(part) for part in scorer.stream(NAMES, chunk=3)] == [3, 3, 1]
    values, offsets = scorer.position_log_probs(NAMES)
    sums = torch.stack([sum(part.double()) for part in values.tensor_split(offsets[1:-1])])
    assert torch.equal(sums.float(), scores)
    logits, same = scorer.logits(NAMES)
    targets = torch.cat([torch.tensor([ABC.characters.index(c) + 1 for c in name] + [0]) for name in NAMES])
    found = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert torch.equal(same, offsets) and torch.allclose(found, values, rtol=0, atol=1e-5)
    bits = scorer.bits_per_character(NAMES)
    assert torch.allclose(bits, -scores / log(2) / torch.tensor([len(name) + 1 for name in NAMES]))
    assert torch.equal(scorer.bits_per_character(encoded), bits)


@pytest.mark.parametrize("options", [{}, {"compiled": False}, {"gated": True}], ids=str)
def test_another_default_device_changes_nothing(options):
    expected, encoded = small_scorer(**options).score(NAMES), ABC.encode(NAMES, context=8)
    scorer = small_scorer(**options, quantiles=torch.tensor([1.0, 2.0]))
    with torch.device("meta"):
        assert torch.equal(scorer.score(NAMES), expected) and torch.equal(scorer.score(encoded), expected)
        values, logits = scorer.position_log_probs(NAMES)[0], scorer.logits(NAMES)[0]
        assert values.device == logits.device == scorer.percentile(NAMES).device == torch.device("cpu")


def test_percentile_counts_quantiles_below():
    scorer = small_scorer(quantiles=torch.tensor([1.0, 2.0, 3.0, 100.0]))
    bits = scorer.bits_per_character(NAMES)
    assert scorer.percentile(NAMES).tolist() == [25.0 * sum(q < b for q in (1, 2, 3, 100)) for b in bits.tolist()]
    assert scorer.percentile(["a-b"], unknown="nan").isnan().all()
    assert rejects(
        r"no quantiles of its training list; write it with save_checkpoint\(.*names=", small_scorer().percentile, NAMES
    )


def test_no_names_and_empty_names_have_scores():
    scorer = small_scorer()
    assert scorer.score([]).shape == scorer.score(ABC.encode([], context=8)).shape == (0,)
    values, offsets = scorer.position_log_probs([])
    assert values.shape == (0,) and offsets.tolist() == [0] and scorer.logits([])[0].shape == (0, 27)
    assert scorer.score(["", ""]).isfinite().all() and scorer.position_log_probs([""])[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    "options, step",
    [
        ({"compiled": True}, "distinct.evaluate"),
        ({"compiled": False}, "shared.contribute"),
        ({"gated": True}, "shared.contribute"),
    ],
    ids=str,
)
def test_a_call_that_fails_leaves_nothing_wrong_to_remember(names, monkeypatch, options, step):
    """It leaves no id of a node that has no value."""
    scorer, fresh, names = small_scorer(remember=True, **options), small_scorer(**options), names[::5]
    expected = fresh.score(names)
    assert torch.equal(scorer.score(names[:3000]), expected[:3000])
    with monkeypatch.context() as patch:
        patch.setattr(f"wavenet_conv.engine.{step}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scorer.score(names[3000:6000])
    assert torch.equal(scorer.score(names), expected)


@pytest.mark.parametrize("options", [{}, {"compiled": False}, {"gated": True}], ids=str)
def test_autocast_around_it_changes_no_bits(options):
    scorer, stream = small_scorer(**options), Stream(random_conv(dtype=torch.float32), compiled=options == {})
    expected, logits = scorer.score(NAMES), stream.step(torch.tensor([3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer.score(NAMES), expected) and torch.equal(
            small_scorer(**options).score(NAMES), expected
        )
        new = Stream(random_conv(dtype=torch.float32), compiled=options == {})
        assert torch.equal(new.step(torch.tensor([3])), logits)
        assert scorer.logits(NAMES)[0].dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"compiled": False}, {"gated": True}], ids=str)
def test_inference_mode_around_calls_leaves_no_trace(options):
    with torch.inference_mode():
        scorer = small_scorer(**options)
        expected = scorer.score(NAMES)
    for _ in range(2):
        assert torch.equal(scorer.score(NAMES), expected)
        with torch.inference_mode():
            assert torch.equal(scorer.score(NAMES), expected)


def test_a_stream_draws_the_same_names_under_autocast():
    conv = random_conv(dtype=torch.float32)
    expected = sample(conv, ABC, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sample(conv, ABC, 50) == expected


@pytest.mark.parametrize("character", ["7", ".", "\U0001f600", "\ud800"])
def test_unknown_characters_are_rejected_or_give_nan(character):
    scorer = small_scorer()
    names = ["emma", f"an{character}a", "ava"]
    assert rejects("name 1 .*at position 2 is not in the vocabulary", scorer.score, names)
    scores = scorer.score(names, unknown="nan")
    assert scores.isnan().tolist() == [False, True, False]
    assert torch.equal(scores[::2], scorer.score(["emma", "ava"]))
    values, offsets = scorer.position_log_probs(names, unknown="nan")
    assert offsets.tolist() == [0, 5, 6, 10] and values.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda:7"), "gpu", 9, "cuda:x"], ids=str)
def test_a_device_that_is_not_there_is_named_with_the_fix(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    conv, fix = random_conv(), "leave device out|which PyTorch does not know; name 'cpu'"
    for call, arguments in ((Scorer, (conv, ABC)), (Stream, (conv,)), (sample, (conv, ABC, 1))):
        assert rejects(rf"device is .*{device}.*({fix})", call, *arguments, device=device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert rejects("the last CUDA device here is 'cuda:6'; name", Stream, conv, device="cuda:7")


def test_wrong_arguments_are_rejected():
    scorer = small_scorer()
    for names, message in (("emma", "names is one string"), (["emma", 3], "name 1 is 3"), (None, "names is None")):
        assert rejects(message, scorer.score, names)
    assert rejects("unknown is 'skip'; it is 'error' or 'nan'", scorer.score, NAMES, unknown="skip")
    tokens, lengths = ABC.encode(NAMES, context=8)
    assert rejects("are not what vocab.encode.names, context=8. returns", scorer.score, (tokens[:, 4:], lengths))
    assert rejects(r"token 31 at \[0, 8\]", scorer.score, (tokens + 26, lengths))
    assert rejects("the vocabulary has 3 tokens and the model 27", Scorer, random_conv(), Vocabulary("ab"))
