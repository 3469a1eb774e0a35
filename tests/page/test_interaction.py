"""In a browser: what one can do on the page, with a mouse, with a keyboard, on a phone, with hostile text."""

from __future__ import annotations

import pytest

from wavenet_conv import Scorer, Vocabulary
from wavenet_conv.page import page_html

pytestmark = pytest.mark.browser

HOSTILE = "<script>alert(1)</script>"
NODES = "nodes => Object.fromEntries(nodes.map(node => [node.id.slice(2), node.dataset.%s]))"


def data_of(window, key: str, value: str) -> set[tuple[int, int]]:
    """The nodes, (row, position), with this value of a data attribute."""
    found = window.locator("#diagram .node[id]").evaluate_all(NODES % key)
    return {tuple(map(int, place.split("-"))) for place in found if found[place] == value}


def tree(t: int) -> set[tuple[int, int]]:
    """The nodes of the lecture's tree of output t, with its tokens in row 0 and the output in row 4."""
    return {(row, p) for row, span in enumerate((1, 2, 4, 8)) for p in range(t, t + 8, span)} | {(4, t)}


def without_tokens(nodes: set[tuple[int, int]]) -> set[tuple[int, int]]:
    return {node for node in nodes if node[0]}


def shift(window) -> float:
    """Columns that the drawn tree has moved."""
    return window.evaluate("new DOMMatrix(getComputedStyle(find('tree')).transform).e / state.column")


def focused(window) -> str:
    return window.evaluate("document.activeElement.id")


def test_the_slider_moves_the_tree_by_mouse_and_by_keys(window):
    assert window.inner_text("#shown") == "4 of 4" and shift(window) == 4 and data_of(window, "tree", "true") == tree(4)
    slider = window.locator("#output")
    slider.focus()
    for key, t in (("ArrowLeft", 3), ("ArrowLeft", 2), ("Home", 0), ("ArrowRight", 1), ("End", 4)):
        window.keyboard.press(key)
        assert window.inner_text("#shown") == f"{t} of 4" and shift(window) == t
        assert data_of(window, "tree", "true") == tree(t)
    assert slider.get_attribute("aria-valuetext").startswith("output 4 of 4 gives . 1")
    box = slider.bounding_box()
    window.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert window.inner_text("#shown") == "2 of 4" and data_of(window, "tree", "true") == tree(2)
    assert "Output 2 of 4 gives m" in window.inner_text("#live")


def test_three_modes_colour_what_each_computes(window):
    assert window.is_checked("input[value=convolution]")
    for t in range(5):
        window.evaluate("t => showOutput(t)", t)
        earlier = without_tokens(set().union(*map(tree, range(t))))
        window.locator("label", has_text="Convolution").click()
        assert data_of(window, "state", "old") == earlier
        assert data_of(window, "state", "new") == without_tokens(tree(t)) - earlier
        window.locator("label", has_text="Loop").click()
        assert data_of(window, "state", "new") == without_tokens(tree(t)) and not data_of(window, "state", "old")
        window.locator("label", has_text="Stream").click()
        assert data_of(window, "state", "new") == {(1, t + 6), (2, t + 4), (3, t), (4, t)}
        # The layer above reads 1, 2 and 4 positions back.
        rings = ((0, t + 7, 1), (1, t + 6, 2), (2, t + 4, 4))
        assert data_of(window, "state", "kept") == {(row, p - back) for row, p, d in rings for back in range(1, d + 1)}


def test_numbers_in_nodes(window):
    number = lambda row, p: window.text_content(f"#n-{row}-{p} text")
    window.evaluate("showOutput(3)")
    # Node (1, 4) is in the trees of outputs 0, 2 and 4; node (2, 4) in those of 0 and 4.
    assert (number(1, 4), number(2, 4), number(2, 3), number(3, 0)) == ("×3", "×2", "", "")
    window.locator("label", has_text="Loop").click()
    assert (number(1, 4), number(2, 4), number(2, 3), number(3, 4)) == ("×2", "×1", "×1", "")
    window.locator("label", has_text="Stream").click()
    assert number(1, 4) == ""


def test_modes_by_keys_and_their_legends(window):
    window.focus("input[value=convolution]")
    legends = {"loop": "not computed by", "convolution": "computed for an earlier", "stream": "kept in a ring buffer"}
    for key, mode in (("ArrowLeft", "loop"), ("ArrowRight", "convolution"), ("ArrowRight", "stream")):
        window.keyboard.press(key)
        assert window.inner_text("#sentence").lower().startswith(f"{mode}: output 4 ")
        shown = [other for other in legends if legends[other] in window.inner_text(".legend")]
        assert shown == [mode] and window.locator(".chosen").get_attribute("id") == mode


def test_play_steps_to_the_end_and_pauses(window):
    shown = lambda: window.inner_text("#shown")
    window.focus("#play")
    window.keyboard.press("Enter")
    assert (shown(), window.inner_text("#play")) == ("0 of 4", "Pause")
    for t in (1, 2):
        window.clock.run_for(900)
        assert shown() == f"{t} of 4" and shift(window) == t
    window.keyboard.press("Enter")
    window.clock.run_for(5000)
    assert (shown(), window.inner_text("#play")) == ("2 of 4", "Play")
    window.click("#play")
    window.clock.run_for(10_000)
    assert (shown(), window.inner_text("#play")) == ("4 of 4", "Play")
    window.click("#play")
    window.locator("#n-4-4").click()  # an output that is chosen ends it
    window.clock.run_for(10_000)
    assert (shown(), window.inner_text("#play")) == ("4 of 4", "Play")


def kin(window) -> dict[str, set]:
    return {name: data_of(window, "kin", name) for name in ("self", "child", "parent")}


def test_a_node_shows_its_parents_children_and_values_under_the_pointer(window):
    assert window.inner_text("#node-title") == "Node (3, 4), top of the tree"
    window.hover("#n-2-4")
    assert kin(window) == {"self": {(2, 4)}, "child": {(1, 4), (1, 6)}, "parent": {(3, 0), (3, 4)}}
    assert window.inner_text("#node-title") == "Node (2, 4)"
    text = window.inner_text("#node-text")
    assert text.startswith("Covers 4 tokens, “. . . .”. Tap j reads position 4 + j × 2: node (1, 4), node (1, 6).")
    assert "Read by node (3, 4), node (3, 0)." in text and "Same children as 4 other nodes" in text
    assert window.locator("#strips svg").count() == 3
    assert window.locator("#strips svg").last.locator("rect").count() == 128
    assert window.locator("#strips svg").last.get_attribute("aria-label").startswith("128 values of node (2, 4), −")
    for line in ("#children", "#parents"):
        assert window.get_attribute(line, "d").count("M") == 2
    window.hover("h1")
    assert kin(window) == {"self": set(), "child": set(), "parent": set()}
    assert window.inner_text("#node-title") == "Node (3, 4), top of the tree"


def test_outputs_and_tokens_choose_an_output(window):
    window.click("#n-4-1")
    assert window.inner_text("#shown") == "1 of 4"
    window.click("#n-0-11")
    assert window.inner_text("#shown") == "3 of 4"
    window.click("#n-0-2")  # padding: no output predicts it
    assert window.inner_text("#shown") == "3 of 4"
    window.focus("#n-4-0")
    window.keyboard.press("Enter")
    assert window.inner_text("#shown") == "0 of 4"


def test_a_click_on_the_distribution_appends_the_character(window):
    bars = window.locator("#next button")
    assert bars.count() == 27 and bars.first.is_disabled() and bars.first.get_attribute("class") == "actual"
    share = float(Scorer.load("default").logits(["emma"])[0][-1].softmax(0)[1])
    assert bars.nth(1).get_attribute("aria-label") == f"append a, {share:.1%}".replace("%", " percent")
    bars.nth(26).click()
    assert (window.input_value("#name"), window.inner_text("#shown")) == ("emmaz", "5 of 5")
    window.keyboard.press("Enter")  # the bar still has the focus
    assert window.input_value("#name") == "emmazz" and window.locator("#n-0-13 text").text_content() == "z"
    assert sum(float(percent.lstrip("<")) for percent in bars.locator("small").all_text_contents()) > 95


def test_a_large_vocabulary_shows_the_likeliest_characters(show, random_model):
    vocab = Vocabulary(map(chr, range(0x4E00, 0x4E00 + 300)))
    window = show(page_html(random_model(vocab_size=301), vocab, ""))
    assert window.locator("#next button:visible").count() in (100, 101)
    window.fill("#name", "a")
    assert "and 200 more" in window.inner_text("#problem")


@pytest.mark.parametrize(
    ("typed", "character", "place"),
    [("emmä", "ä", 4), ("Emma", "E", 1), (HOSTILE, "<", 1), ("a\"'", '"', 2), ("em.ma", ".", 3), ("e😀", "😀", 2)],
)
def test_an_unknown_character_is_named_and_leaves_the_diagram(window, typed, character, place):
    before = window.inner_html("#diagram")
    window.fill("#name", typed)
    message = f"The model does not know “{character}”, character {place}. It knows: a b c d e f g"
    assert window.inner_text("#problem").startswith(message) and window.get_attribute("#name", "aria-invalid") == "true"
    assert window.inner_html("#diagram") == before
    window.fill("#name", "ava")
    assert window.inner_text("#problem") == "" and window.inner_text("#shown") == "3 of 3"
    assert window.get_attribute("#name", "aria-invalid") == "false"


def test_the_empty_name(window):
    window.fill("#name", "")
    assert window.inner_text("#shown") == "0 of 0" and window.is_disabled("#play") and window.is_disabled("#output")
    assert window.locator("#loop .number").inner_text() == "7"
    window.locator("#next button").nth(5).click()
    assert window.input_value("#name") == "e" and window.is_enabled("#play")


def test_two_hundred_characters(window):
    window.fill("#name", "abcdefghij" * 20)
    assert window.inner_text("#shown") == "200 of 200"
    assert window.locator(".node[id]").count() == 208 + 207 + 205 + 201 + 201
    scroller = "find('scroller').scrollLeft"
    far = window.evaluate(scroller)
    window.evaluate("showOutput(0)")
    assert window.evaluate(scroller) == 0 < far and shift(window) == 0


def test_a_hostile_vocabulary_and_name(show, random_model):
    name = HOSTILE + "<!--\"'&\u2028\u0301"
    vocab = Vocabulary(name)
    window = show(page_html(random_model(vocab_size=len(vocab)), vocab, name))
    assert window.evaluate("state.name.join('')") == name and window.inner_text("#problem") == ""
    shown = window.locator(".node.token[id] text").all_text_contents()
    assert shown[8:11] == ["<", "s", "c"] and shown[-2:] == ["U+2028", "U+0301"]
    assert window.locator("script").count() == 3 and window.locator("#diagram script").count() == 0
