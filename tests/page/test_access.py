"""In a browser: what the keyboard, a screen reader, a window of another size and the user's colors get."""

from __future__ import annotations

import re

import pytest

from wavenet_conv import Vocabulary
from wavenet_conv.page import page_html

pytestmark = pytest.mark.browser


def chosen(window) -> list[str]:
    """The nodes whose details are shown."""
    return window.locator('[data-kin="self"]').evaluate_all("nodes => nodes.map(node => node.id)")


def entry(window) -> list[str]:
    """The nodes at which the Tab key enters the diagram."""
    return window.locator('.node[tabindex="0"]').evaluate_all("nodes => nodes.map(node => node.id)")


def focused(window) -> str:
    return window.evaluate("document.activeElement.id")


def test_arrow_keys_walk_through_the_nodes(window):
    window.focus("#output")
    window.keyboard.press("Tab")
    assert focused(window) == "n-3-4"
    walk = (("ArrowDown", "n-2-4"), ("ArrowRight", "n-2-5"), ("ArrowDown", "n-1-5"), ("ArrowLeft", "n-1-4"))
    walk += (("ArrowDown", "n-0-4"), ("ArrowDown", "n-0-4"), ("ArrowUp", "n-1-4"), ("ArrowUp", "n-2-4"))
    for key, goal in walk:
        window.keyboard.press(key)
        assert focused(window) == goal and chosen(window) == [goal]
    assert window.evaluate("getComputedStyle(document.activeElement.firstChild).strokeWidth") == "5px"
    window.keyboard.press("Tab")
    assert chosen(window) == [] and entry(window) == ["n-2-4"]


def test_a_resized_window_fits_the_diagram_and_keeps_the_focus(window):
    column = "state.column"
    window.focus("#n-2-4")
    before = window.evaluate(column)
    window.set_viewport_size({"width": 1280, "height": 500})
    assert focused(window) == "n-2-4" and window.evaluate(column) == before
    window.set_viewport_size({"width": 500, "height": 800})
    window.wait_for_function("() => state.column === 36")
    assert before > 36 and focused(window) == "n-2-4" and chosen(window) == entry(window) == ["n-2-4"]
    window.hover("#n-2-3")
    window.set_viewport_size({"width": 1280, "height": 500})
    window.wait_for_function("() => state.column !== 36")
    assert window.evaluate(column) == before and focused(window) == "n-2-4"


def test_the_last_of_pointer_and_keyboard_wins(window):
    window.hover("#n-1-8")
    window.focus("#n-2-4")
    assert chosen(window) == ["n-2-4"]
    window.keyboard.press("ArrowDown")
    assert chosen(window) == ["n-1-4"]
    window.hover("#n-2-3")
    assert chosen(window) == ["n-2-3"]
    window.hover("h1")
    assert chosen(window) == ["n-1-4"]


def test_the_tab_key_enters_at_the_top_of_the_shown_tree(window):
    assert entry(window) == ["n-3-4"]
    window.focus("#output")
    window.keyboard.press("Home")
    assert entry(window) == ["n-3-0"]
    window.keyboard.press("Tab")
    assert focused(window) == "n-3-0"
    window.evaluate("showOutput(2)")  # as Play does
    assert focused(window) == "n-3-0" and entry(window) == ["n-3-0"]


def test_keys_of_the_diagram_do_not_scroll_the_page(window):
    window.evaluate("window.addEventListener('keydown', event => (window.taken = event.defaultPrevented))")
    for node in ("n-2-4", "n-0-4", "n-4-0"):  # the last two have nothing below them, and nothing above
        for key in ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"):
            window.focus(f"#{node}")
            window.keyboard.press(key)
            assert window.evaluate("taken"), (node, key)
    window.keyboard.press("PageDown")
    assert not window.evaluate("taken")


def test_the_labels_of_nodes_say_their_state_and_their_windows(window):
    said = lambda row, p: window.get_attribute(f"#n-{row}-{p}", "aria-label")
    window.evaluate("showOutput(3)")
    assert said(1, 4) == "node (1, 4), covers . ., in 3 windows, computed for an earlier output"
    assert said(3, 3) == "node (3, 3), covers . . . . . e m m, in 1 window, computed by this output"
    assert said(3, 4).endswith(", in 1 window, in no window so far") and said(0, 4) == "token 4, covers ., in 5 windows"
    window.check("input[value=loop]", force=True)
    assert said(2, 4).endswith(", in 2 windows, not computed by this output") and "computed by this" in said(1, 5)
    window.check("input[value=stream]", force=True)
    assert said(0, 9) == "token 9, covers m, in 3 windows, kept in a ring buffer"
    assert said(2, 3).endswith(", kept in a ring buffer") and said(1, 0).endswith(", not kept")


def test_a_space_is_called_space(show, random_model):
    window = show(page_html(random_model(vocab_size=4), Vocabulary("a b"), "a b"))
    assert window.get_attribute("#next button:nth-child(2)", "aria-label").startswith("append space, ")
    assert "covers . . . . . a space b," in window.get_attribute("#n-3-3", "aria-label")
    window.evaluate("showOutput(1)")
    assert "Output 1 of 3 gives space " in window.inner_text("#live")
    assert window.locator("#n-0-9 text").text_content() == "␣"


def test_the_back_button_shows_the_mode_that_is_drawn(window):
    window.check("input[value=loop]", force=True)
    window.evaluate("showOutput(1)")
    window.goto("about:blank")
    window.go_back()
    assert window.input_value("[name=mode]:checked") == window.evaluate("state.mode")
    assert window.input_value("#output") == str(window.evaluate("state.t"))


LOOKS = [(scheme, width, motion) for scheme in ("light", "dark") for width in (360, 1280) for motion in (True, False)]


@pytest.mark.parametrize(("scheme", "width", "motion"), LOOKS)
def test_no_overflow_and_readable_text(show, default_html, scheme, width, motion):
    window = show(
        default_html,
        viewport={"width": width, "height": 740},
        color_scheme=scheme,
        reduced_motion="no-preference" if motion else "reduce",
    )
    window.fill("#name", "wilhelmina")
    for mode in ("loop", "convolution", "stream"):
        window.check(f"input[value={mode}]", force=True)
        assert window.evaluate("document.documentElement.scrollWidth") == width
        assert window.evaluate(LOW_CONTRAST) == []
    durations = window.evaluate("getComputedStyle(find('tree')).transitionDuration")
    assert (durations != "0s") == motion


# Texts whose colour has a contrast below 4.5 with what is behind them.
LOW_CONTRAST = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => channels(color).slice(0, 3)
    .map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const background = element => {
    if (element.closest(".node")) return getComputedStyle(element.closest(".node").firstChild).fill;
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
  };
  const texts = [...document.querySelectorAll("main *")].filter(element => element.checkVisibility()
    && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const low = texts.filter(element => {
    const style = getComputedStyle(element);
    const color = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [color, background(element)].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
  });
  return low.map(element => `${element.tagName} ${element.className} ${element.textContent.trim().slice(0, 30)}`);
}"""


PAINTED = (".counters i", ".next i", ".swatch.new", ".swatch.old", ".swatch.kept", ".swatch.band", ".swatch.arrow")
PAINTED += ("#strips .positive", "#strips .negative", ".surprise", "#n-3-4 circle", "#n-3-3 circle")

# Elements of which every part that is drawn has the color of the page.
INVISIBLE = """selectors => selectors.filter(selector => {
  const style = getComputedStyle(document.querySelector(selector));
  const own = selector.match(/circle|strips|surprise/) ? [style.fill, style.stroke]
    : [style.backgroundColor, ...(parseFloat(style.borderTopWidth) ? [style.borderTopColor] : [])];
  const page = getComputedStyle(document.querySelector("main section")).backgroundColor;
  return own.every(color => color === page || color === "none" || color === "rgba(0, 0, 0, 0)");
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_forced_colors_leave_what_is_drawn(show, default_html, scheme):
    window = show(default_html, forced_colors="active", color_scheme=scheme)
    fill = "selector => getComputedStyle(document.querySelector(selector)).fill"
    assert window.evaluate(INVISIBLE, PAINTED) == []
    assert window.evaluate(fill, "#strips .positive") != window.evaluate(fill, "#strips .negative")
    # The bars without an outline, and the modes without a plate of the page's color behind their text.
    assert window.evaluate("getComputedStyle(find('next').children[1]).borderTopColor") == "rgba(0, 0, 0, 0)"
    assert window.evaluate("getComputedStyle(document.querySelector(':checked + span')).forcedColorAdjust") == "none"
    for mode in ("loop", "convolution", "stream"):
        window.check(f"input[value={mode}]", force=True)
        assert window.evaluate(LOW_CONTRAST) == []
        system = window.evaluate("getComputedStyle(find('n-3-4').firstChild).fill")
        assert system == window.evaluate("getComputedStyle(document.querySelector('.swatch.new')).backgroundColor")


def test_everything_has_a_name_for_a_screen_reader(window):
    for selector in ("input, button", "#strips svg", ".node[id]", "#diagram"):
        for element in window.locator(selector).all()[:80]:
            named = "element => element.ariaLabel || element.labels?.[0]?.textContent || element.textContent"
            assert element.evaluate(named).strip()
    assert window.get_attribute("#live", "role") == "status" and window.get_attribute("html", "lang") == "en"
    assert re.fullmatch(r"(0|-1)", window.get_attribute("#n-1-0", "tabindex"))
