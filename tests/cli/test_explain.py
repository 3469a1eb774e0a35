"""`wavenet-conv explain`: the numbers of `Scorer` and `count_nodes`, and text for any terminal and encoding."""

from __future__ import annotations

import io
import json
import re
import sys
from math import ceil, exp

import pytest
import torch
from helpers import ALPHABET, KINDS, random_tree
from rich.cells import cell_len

from wavenet_conv import ConvWaveNet, Scorer, Vocabulary, WaveNetConfig, from_tree, save_checkpoint
from wavenet_conv.counts import count_nodes

UNSAFE = '\t\x1b\x9b\x7f\xa0"\\\u0301\u202e\u2028'
ODD = UNSAFE + "[] é漢😀"
VOCABULARIES = [Vocabulary("ab-é"), Vocabulary.from_mapping(["b", ".", "<E>", "a", "é"], end="<E>")]


@pytest.fixture
def explain(run, monkeypatch):
    """Standard output, of `--json` its records, or the message of an error; by default without colors."""

    def call(*arguments, width=80, code=0, **environment):
        standard = {"COLUMNS": str(width), "FORCE_COLOR": "", "NO_COLOR": "", "TERM": "xterm"}
        for name, value in {**standard, **environment}.items():
            monkeypatch.setenv(name, value)
        found, out, err = run("explain", "--device", "cpu", *arguments)
        assert found == code and (code == 0) == (err == ""), err
        if code == 0 and "--json" in arguments:
            return [json.loads(line) for line in out.decode("ascii").splitlines()]
        return err if code else out

    return call


def check_nodes(table: list[list[str]], counts: dict[str, list[int]]) -> None:
    columns = [[int(cell) for cell in column] for column in zip(*(row[1:] for row in table[1:]))]
    assert columns == [[*layers, sum(layers)] for layers in counts.values()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES, ids=["standard", "mapped"])
def test_json_has_the_numbers_of_the_library(explain, tmp_path, kind, vocab):
    names, path = ["ab", "", "éabab"], tmp_path / "model.safetensors"
    model = from_tree(random_tree((2, 3), n_embd=4, n_hidden=5, vocab_size=5, dtype=torch.float32, **kind))
    save_checkpoint(path, model, vocab, names=["ab", "ba", "é"])
    scorer = Scorer.load(path, device="cpu")
    for record, name in zip(explain("--json", "--model", path, *names), names, strict=True):
        assert record["name"] == name and [p["character"] for p in record["positions"]] == [*name, None]
        for key in ("score", "bits_per_character", "percentile"):
            assert record[key] == getattr(scorer, key)([name]).item()
        values, rows = scorer.position_log_probs([name])[0].tolist(), scorer.logits([name])[0].double().softmax(1)
        for position, value, row in zip(record["positions"], values, rows, strict=True):
            found = [position["log_probability"], position["probability"], 2 ** -position["bits"]]
            assert found == [value, pytest.approx(exp(value)), pytest.approx(exp(value))]
            likeliest = zip(*(part[:3].tolist() for part in row.sort(descending=True)))
            expected = [{"character": vocab.decode([t]) or None, "probability": pytest.approx(p)} for p, t in likeliest]
            assert position["likeliest"] == expected
        for key, counted in (("nodes", [name]), ("nodes_together", names)):
            assert record[key] == {way: [*nodes] for way, nodes in count_nodes(counted, model.config)._asdict().items()}


def test_text_shows_the_same_numbers(explain):
    text, found = explain("emma", "gemma").decode(), explain("--json", "emma", "gemma")
    *blocks, together = ([line.split() for line in block.splitlines()] for block in text.split("\n\n"))
    longest = max(position["bits"] for record in found for position in record["positions"])
    for (heading, _, *rows, summary), nodes, record in zip(blocks[0::2], blocks[1::2], found, strict=True):
        for row, position in zip(rows, record["positions"], strict=True):
            others = [(other["character"] or "end", f"{other['probability']:.0%}") for other in position["likeliest"]]
            assert row[:2] == [position["character"] or "end", f"{position['probability']:.1%}"]
            assert row[2] == f"{position['bits']:.2f}" and row[4:] == [cell for other in others for cell in other]
            assert len(row[3]) == ceil(int(320 * position["bits"] / longest) / 8)
        expected = "score {score:.4f} nats, {bits_per_character:.3f} bits per character, percentile {percentile:.1f}"
        assert heading == [json.dumps(record["name"])] and " ".join(summary) == expected.format(**record)
        check_nodes(nodes, record["nodes"])
    check_nodes(together[1:], found[0]["nodes_together"])


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("names", [["emma", "xqz"], ["a" * 3000, ""], ["é漢😀" * 3, ODD]], ids=["ascii", "long", "odd"])
def test_lines_fit_and_all_numbers_are_shown(explain, save_random, tmp_path, names, width):
    text = explain("--model", save_random(tmp_path / "model.safetensors", ALPHABET + ODD), *names, width=width).decode()
    assert max(map(cell_len, text.splitlines())) <= width and not re.search("^a{9}", text, re.M)  # no second line
    assert len(re.findall(r'^(?:" "|\S+) +[\d.]+% +[\d.]+ ', text, re.M)) == len(names) + sum(map(len, names))
    assert len(re.findall(r"^ +(?:\d|all)(?: +[\d,]+){5}$", text, re.M)) == 3 * 4


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_odd_characters_cannot_change_the_terminal(explain, save_random, monkeypatch, tmp_path, encoding):
    path, stdout = save_random(tmp_path / "model.safetensors", ODD + "red/:smile"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding))
    explain("--model", path, ODD, "[red] [/]", ":smile:", FORCE_COLOR="1", NO_COLOR="1")
    text, escapes = stdout.getvalue().decode(encoding), [json.dumps(c)[1:-1] for c in UNSAFE]
    assert '\n"[red] [/]"\n' in text and '\n":smile:"\n' in text and not set(UNSAFE) - {*'"\\'} & set(text)
    assert text.startswith(f'"{"".join(escapes)}[] é漢😀"\n'.encode(encoding, "replace").decode(encoding))
    assert all(re.search(rf"^{re.escape(shown)} ", text, re.M) for shown in [*escapes, '" "', "["])


def test_colors_are_for_terminals_and_change_no_text(explain):
    plain, colored = explain("emma", "xqz"), explain("emma", "xqz", FORCE_COLOR="1")
    assert b"\x1b" not in plain and re.sub(rb"\x1b\[[0-9;]*m", b"", colored) == plain
    for color, bits in ((32, b"1.81"), (33, b"4.35"), (31, b"13.26")):  # a uniform guess needs 4.75
        assert re.search(rb"%s \x1b\[%d[;m]" % (bits, color), colored)


def test_logits_that_are_not_finite_are_null_and_nan(explain, tmp_path):
    path, model = tmp_path / "model.safetensors", ConvWaveNet(WaveNetConfig(n_embd=4, n_hidden=8, vocab_size=2))
    for parameter in model.parameters():
        parameter.data.fill_(3e38)
    save_checkpoint(path, model.eval(), Vocabulary("a"))
    (record,), text = explain("--json", "--model", path, ""), explain("--model", path, "").decode()
    assert record["score"] is record["percentile"] is record["positions"][0]["bits"] is None
    assert re.search(r"^end +nan% +nan +\S+ +nan%", text, re.M) and not re.search("percentile|together", text)


@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_full_standard_output(explain, monkeypatch, arguments, buffering):
    with open("/dev/full", "wb", buffering=buffering) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=not buffering))
        found = explain(*arguments, "emma", code=1)
    assert found == "wavenet-conv: standard output: No space left on device; the output is not complete\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["ava", "zoë"],
            1,
            f"NAME 'zoë': character 'ë' at position 2 is not in the vocabulary '{ALPHABET}'; remove it",
        ),
        (
            ["Ava"],
            1,
            f"character 'A' at position 0 is not in the vocabulary '{ALPHABET}'; write 'a', which is, or give",
        ),
        (["a" * 3000 + "\0"], 1, f"NAME '{'a' * 40}': character '\\x00' at position 3000 is not in the vocabulary"),
        (["--model", __file__, "ava"], 2, f"--model {__file__}: not a safetensors file"),
    ],
)
def test_errors(explain, arguments, code, message):
    assert message in explain(*arguments, code=code) and message in explain("--json", *arguments, code=code)
