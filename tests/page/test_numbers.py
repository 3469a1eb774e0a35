"""In a browser: the page's log-probabilities, scores and counters equal those of `Scorer` and counts made here."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from wavenet_conv import Scorer, Vocabulary
from wavenet_conv.page import page_html

pytestmark = pytest.mark.browser

LETTERS = "abcde"
NAMES = ["", "a", "bad", "aaaaaaaa", "abcdeedcba" * 2]
KINDS = {
    "lecture": {},
    "trigram": {"kernel_sizes": (3,)},
    "uneven": {"kernel_sizes": (4, 2), "n_hidden": (8, 5)},
    "deep": {"kernel_sizes": (2, 2, 2, 2), "norm": "none"},
    "ones": {"kernel_sizes": (1, 3, 1)},
    "gated": {"kernel_sizes": (2, 3), "gated": True},
    "gelu": {"norm": "layer", "activation": "gelu"},
    "merging head": {"kernel_sizes": (2, 2), "head_kernel_size": 2, "head_norm": "batch"},
    "layer norm head": {"kernel_sizes": (2,), "head_kernel_size": 3, "head_norm": "layer"},
    "mixed": {"norm": ("layer", "batch", "none"), "activation": ("silu", "sigmoid", "relu"), "bias": True},
    "linear": {"norm": "none", "activation": "none"},
}

# What the page has computed, and what it shows, for each of some names.
READ = """names => names.map(name => {
  showName(Array.from(name));
  const shown = id => Number(document.getElementById(id).textContent.replace("−", "-").replace("%", ""));
  const outputs = state.rows.at(-1);
  return {
    logProbs: outputs.map((output, t) => output.logProbs[target(t)]),
    sums: outputs.map(output => output.logProbs.reduce((sum, logProb) => sum + Math.exp(logProb), 0)),
    nats: shown("nats"), bits: shown("bits"), percentile: shown("percentile"),
  };
})"""


def assert_equal(found: list[dict], scorer: Scorer, names: list[str]):
    values, offsets = scorer.position_log_probs(names)
    for index, name in enumerate(names):
        expected = values[offsets[index] : offsets[index + 1]].double()
        assert (torch.tensor(found[index]["logProbs"], dtype=torch.float64) - expected).abs().max() < 1e-5, name
        assert max(abs(total - 1) for total in found[index]["sums"]) < 1e-12
        assert abs(found[index]["nats"] - float(scorer.score([name]))) < 1e-3
        assert abs(found[index]["bits"] - float(scorer.bits_per_character([name]))) < 1e-3


def test_fifty_names_with_the_default_model(show, default_html, names):
    scorer, some = Scorer.load("default", device="cpu"), random.Random(0).sample(names, 49) + ["x" * 40]
    found = show(default_html).evaluate(READ, some)
    assert_equal(found, scorer, some)
    for row, percentile in zip(found, scorer.percentile(some).tolist()):
        assert abs(row["percentile"] - percentile) < 0.16  # one of 1,001 quantiles, and a digit


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(show, random_model, kind):
    model, vocab = random_model(vocab_size=len(LETTERS) + 1, **KINDS[kind]), Vocabulary(LETTERS)
    window = show(page_html(model, vocab, "bad"))
    assert_equal(window.evaluate(READ, NAMES), Scorer(model, vocab), NAMES)
    assert not window.is_visible("text=of the training list")


@pytest.mark.parametrize("end", range(4))
def test_the_end_may_be_any_token(show, random_model, end):
    keys = ["b", ".", "a"]
    keys.insert(end, "<E>")
    vocab, names = Vocabulary.from_mapping(keys, end="<E>"), ["", "ab.", "b.b.b.a"]
    model = random_model(vocab_size=4, dtype=torch.float64)
    window = show(page_html(model, vocab, "ab."))
    assert_equal(window.evaluate(READ, names), Scorer(model, vocab), names)
    assert window.locator("#next button b").all_text_contents() == ["END" if key == "<E>" else key for key in keys]


def counted(kernel_sizes: tuple[int, ...], context: int, name: str, t: int) -> dict[str, int]:
    """Nodes for outputs 0 to t, counted one by one; a node is its layer and the tokens that it covers."""
    tokens = "." * context + name[:t]
    spans = [prod(kernel_sizes[: layer + 1]) for layer in range(len(kernel_sizes))]
    everywhere = [(span, tokens[p : p + span]) for span in spans for p in range(len(tokens) - span + 1)]
    trees = [(span, p) for start in range(t + 1) for span in spans for p in range(start, start + context, span)]
    stream = [(span, end) for span in spans for end in range(context, len(tokens) + 1)]  # nodes that end with a token
    return {
        "loop": len(trees),
        "convolution": len(everywhere),
        "stream": len(stream),
        "distinct": len(set(everywhere)),
    }


@pytest.mark.parametrize("kind", ["lecture", "uneven", "deep", "merging head", "layer norm head"])
def test_counters_at_every_output(show, random_model, kind):
    model = random_model(vocab_size=len(LETTERS) + 1, **KINDS[kind])
    window = show(page_html(model, Vocabulary(LETTERS), ""))
    for name in NAMES:
        window.fill("#name", name)
        for t in range(len(name) + 1):
            window.evaluate("t => showOutput(t)", t)
            found = {
                key: int(window.inner_text(f"#{key} .number")) for key in ("loop", "convolution", "stream", "distinct")
            }
            assert found == counted(model.config.kernel_sizes, model.context, name, t), (name, t)


def test_the_lectures_counts(show, default_html):
    window = show(default_html)
    numbers = window.locator(".counters .number").all_inner_texts()
    assert numbers == ["35", "25", "15", "15"]  # 7 (L + 1), 3 L + 13, 3 (L + 1)


def test_a_drawn_name_falls_on_the_numbers_of_the_generator(show, default_html):
    window, scorer = show(default_html), Scorer.load("default", device="cpu")
    window.evaluate("Math.random = () => 0.5")
    window.click("#draw")
    name = ""
    while True:
        logits, _ = scorer.logits([name])
        token = int((torch.softmax(logits[-1].double(), 0).cumsum(0) > 0.5).nonzero()[0])
        if token == 0:
            break
        name += scorer.vocab.characters[token - 1]
    assert window.input_value("#name") == name != "" and window.inner_text("#shown") == f"{len(name)} of {len(name)}"
