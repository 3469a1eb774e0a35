"""In a browser: what is drawn says the numbers, and what is typed or moved takes effect at once."""

from __future__ import annotations

import math

import pytest
import torch

from wavenet_conv import Scorer, Vocabulary
from wavenet_conv.page import MAX_NAME, page_html

pytestmark = pytest.mark.browser

CENTER = "element => { const box = element.getBoundingClientRect(); return box.x + box.width / 2; }"


def center(window, selector: str) -> float:
    return window.locator(selector).first.evaluate(CENTER)


@pytest.mark.parametrize("action", ["typing", "slider", "draw", "bar"])
def test_what_one_does_stops_play(window, action):
    window.fill("#name", "olivia")
    window.click("#play")
    window.clock.run_for(900)
    assert (window.inner_text("#shown"), window.inner_text("#play")) == ("1 of 6", "Pause")
    if action == "slider":
        window.press("#output", "ArrowRight")
    elif action == "typing":
        window.press("#name", "End")
        window.keyboard.type("n")
    else:
        window.locator("#draw" if action == "draw" else "#next button >> nth=1").click()
    shown = window.inner_text("#shown")
    assert window.inner_text("#play") == "Play" and shown != "1 of 6"
    window.clock.run_for(10_000)
    assert window.inner_text("#shown") == shown


def test_typing_leaves_the_field_and_its_caret_alone(window):
    window.evaluate("""() => {
      const { get, set } = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value");
      window.writes = 0;
      Object.defineProperty(find("name"), "value", { get, set(value) { window.writes++; set.call(this, value); } });
    }""")
    window.focus("#name")
    window.keyboard.press("Home")
    window.keyboard.press("ArrowRight")
    window.keyboard.type("x?")
    assert window.input_value("#name") == "ex?mma" and window.evaluate("find('name').selectionStart") == 3
    assert window.evaluate("writes") == 0
    window.click("#draw")
    assert window.evaluate("writes") == 1


def test_a_full_field_takes_no_character_from_a_click(show, random_model):
    vocab = Vocabulary("a😀")  # the field counts the second as two
    window = show(page_html(random_model(vocab_size=3), vocab, "a" * (MAX_NAME - 2)))
    allowed = lambda: [button.is_enabled() for button in window.locator("#next button").all()]
    assert allowed() == [False, True, True]
    window.locator("#next button").nth(1).click()
    assert allowed() == [False, True, False]
    window.locator("#next button").nth(1).click()
    assert allowed() == [False, False, False] and window.input_value("#name") == "a" * MAX_NAME
    window.press("#name", "End")
    window.keyboard.type("a")
    assert window.input_value("#name") == "a" * MAX_NAME
    window.keyboard.press("Backspace")
    assert allowed() == [False, True, False]


def test_line_ends_are_in_the_diagram_and_not_in_the_field(show, random_model):
    window = show(page_html(random_model(vocab_size=4), Vocabulary("ab\n"), "a\nb"))
    assert window.locator(".node.token[id] text").all_text_contents()[8:] == ["a", "U+000A", "b"]
    assert window.input_value("#name") == "ab"
    window.press("#name", "End")
    window.keyboard.type("a")
    assert window.evaluate("state.name.join('')") == "aba"


def test_the_percentile_of_a_score_that_is_a_quantile(show, random_model):
    model, vocab, quantiles = random_model(vocab_size=4), Vocabulary("abc"), torch.tensor([1.0, 2, 2, 3])
    for parameter in model.parameters():
        parameter.data.zero_()  # each character then has 2 bits
    expected = Scorer(model, vocab, quantiles=quantiles).percentile([""]).item()
    window = show(page_html(model, vocab, "", quantiles))
    assert window.inner_text("#bits") == "2.000" and expected == 25
    assert window.inner_text("#percentile") == "25.0%"


@pytest.mark.parametrize("name", ["emma", "xqzvkj"])
def test_the_height_of_a_bar_is_its_surprise(window, name):
    window.fill("#name", name)
    bits = Scorer.load("default", device="cpu").position_log_probs([name])[0].double() / -math.log(2)
    assert (bits.max() > 12) == (name != "emma")
    heights = window.locator(".surprise").evaluate_all("bars => bars.map(bar => Number(bar.getAttribute('height')))")
    expected = bits * 64 / max(6, bits.max())
    assert torch.allclose(torch.tensor(heights, dtype=torch.float64), expected.clamp(min=1), atol=1e-3)
    labels = window.locator(".surprise + text").all_text_contents()
    assert labels == [f"{number:.1f}" for number in bits.tolist()]


def test_the_dotted_arrow_leads_from_an_output_to_the_token_that_it_predicts(window):
    for t in range(5):
        window.evaluate("t => showOutput(t)", t)
        ends = window.locator(".predicts").evaluate("""path => [0, path.getTotalLength()].map(length =>
          path.getPointAtLength(length).matrixTransform(path.getScreenCTM()).x)""")
        predicted = f"#n-0-{t + 8} rect" if t < 4 else ".node.end rect"
        assert ends == pytest.approx([center(window, f"#n-4-{t} circle"), center(window, predicted)], abs=0.01)


def test_the_sentence_of_the_loop_counts_what_it_computes_again(window):
    window.check("input[value=loop]", force=True)
    trees = [{(span, p) for span in (2, 4, 8) for p in range(t, t + 8, span)} for t in range(5)]
    for t, tree in enumerate(trees):
        window.evaluate("t => showOutput(t)", t)
        before = len(tree & set().union(*trees[:t]))
        expected = f"Loop: output {t} computes its whole tree: 7 nodes, {before} of them computed before."
        assert window.inner_text("#sentence") == expected


def test_a_strip_has_positive_values_above_and_in_another_color(window):
    cells = (
        window.locator("#strips svg")
        .last.locator("rect")
        .evaluate_all("cells => cells.map(cell => [Number(cell.getAttribute('y')), getComputedStyle(cell).fill])")
    )
    values = window.evaluate("[...state.rows[3][4].h]")
    orange, blue = "rgb(184, 66, 15)", "rgb(31, 111, 178)"
    assert cells == [[0, orange] if value > 0 else [1, blue] for value in values]
    assert min(values) < 0 < max(values)


def test_gelu_of_any_number(window):
    xs = [sign * step / 8 for step in range(60) for sign in (1, -1)]
    found = torch.tensor(window.evaluate("xs => xs.map(ACTIVATIONS.gelu)", xs), dtype=torch.float64)
    expected = torch.nn.functional.gelu(torch.tensor(xs, dtype=torch.float64))
    assert (found - expected).abs().max() < 1e-14


def test_the_policy_of_the_page_blocks_every_load(browser, default_html, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(default_html, "utf-8")
    with browser.new_context() as context:
        window = context.new_page()
        window.goto(path.as_uri())
        window.evaluate("""() => {
          window.blocked = [];
          document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
          const missing = "https://localhost:9/";
          const add = (tag, change) => document.body.append(Object.assign(document.createElement(tag), change));
          add("img", { src: missing });
          add("script", { src: missing });
          add("link", { rel: "stylesheet", href: missing });
          add("iframe", { src: missing });
          fetch(missing).catch(() => {});
        }""")
        kinds = ["connect-src", "frame-src", "img-src", "script-src-elem", "style-src-elem"]
        window.wait_for_function("kinds => kinds.every(kind => blocked.includes(kind))", arg=kinds, timeout=5000)
