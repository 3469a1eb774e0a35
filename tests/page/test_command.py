"""`wavenet-conv page` and `page_html`, without a browser: errors, exit codes, sizes, and what is in the file."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from math import inf, nan

import pytest
import torch

from wavenet_conv import Vocabulary, WaveNetConvError, checkpoint, save_checkpoint
from wavenet_conv.cli import main
from wavenet_conv.errors import ConfigError, NamesError
from wavenet_conv.page import page_html


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs `wavenet-conv page` in an empty folder: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["page", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def data_of(html: str) -> dict:
    """The JSON in a page, read as a browser does: up to the first end of the `script` element."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', html, re.DOTALL)[1])


def test_the_default_page_is_one_file_below_1_mb(run, tmp_path):
    found, html = run(), (tmp_path / "page.html").read_text("utf-8")
    assert found == (0, f"page.html: {len(html.encode()) / 1e6:.2f} MB; open it in a browser\n", "")
    assert os.listdir(tmp_path) == ["page.html"] and 400_000 < len(html.encode()) < 1_000_000
    assert "{{" not in html and data_of(html)["name"] == "emma"
    assert not re.search(r"https?://(?!www\.w3\.org)|\bsrc=|@import|url\(", html)
    code, _, err = run("--name", "ava", "-o", "other.html")
    assert (code, err) == (0, "") and data_of((tmp_path / "other.html").read_text("utf-8"))["name"] == "ava"


SHAPES: dict[str, dict] = {
    "model": {},
    "large": {"kernel_sizes": (2,), "n_embd": 628, "n_hidden": 4000},
    "long": {"kernel_sizes": (2,) * 11},
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing"], "--model missing: No such file or directory; give a file that save_checkpoint wrote"),
        (["--model", "text"], "--model text: not a safetensors file"),
        (["--name", "zoë"], "--name: name 0 ('zoë'): character 'ë' at position 2 is not in the vocabulary 'abc"),
        (["--name", "</script>"], "--name: name 0 ('</script>'): character '<' at position 0 is not in"),
        (
            ["--name", "ab" * 151],
            "--name: the name has 302 characters; a page shows at most 300; give a shorter",
        ),
        (["-o", "."], "--output .: not a regular file in an existing folder"),
        (["-o", "no/page.html"], "--output no/page.html: not a regular file in an existing folder"),
        (["-o", "a" * 300], f"--output {'a' * 300}: File name too long; give another path"),
        (["--model", "model", "-o", "model"], "--output model: this file is being read; give another one"),
        (["-o", str(checkpoint.DEFAULT)], "default.safetensors: this file is being read; give another one"),
        (["--model", "large"], "--model large: its weights take 20.3 MB; a page holds at most 20 MB; give a smaller"),
        (["--model", "long"], "--model long: its context is 2,048 tokens; a page draws at most 1,024; give a"),
    ],
)
def test_wrong_usage_exits_with_2_and_leaves_the_output(run, random_model, tmp_path, arguments, message):
    before = checkpoint.DEFAULT.read_bytes()
    (tmp_path / "text").write_text("emma\n")
    for name in set(SHAPES) & set(arguments):
        save_checkpoint(tmp_path / name, random_model(vocab_size=7, **SHAPES[name]), Vocabulary("abcemz"))
    (tmp_path / "page.html").write_text("earlier")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and "Traceback" not in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert checkpoint.DEFAULT.read_bytes() == before


def test_a_full_disk_exits_with_1_and_leaves_the_output(run, monkeypatch, tmp_path):
    (tmp_path / "page.html").write_text("earlier")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = "wavenet-conv: page.html: No space left on device; the file is as it was before\n"
    assert run() == (1, "", message)
    assert (tmp_path / "page.html").read_text() == "earlier" and os.listdir(tmp_path) == ["page.html"]


def test_the_longest_file_name(run, tmp_path):
    name = "é" * 125 + ".html"  # 255 bytes
    assert run("-o", name)[0] == 0 and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_full_standard_output_exits_with_1(run, monkeypatch, buffering):
    with open("/dev/full", "wb", buffering=buffering) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=not buffering))
        found = run()
    assert found == (1, "", "wavenet-conv: standard output: No space left on device; the output is not complete\n")


def test_a_link_is_followed(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "page.html").symlink_to(tmp_path / "folder" / "real.html")
    assert run()[0] == 0
    assert (tmp_path / "page.html").is_symlink() and (tmp_path / "folder" / "real.html").stat().st_size > 400_000


HOSTILE = "</script><script>alert(1)</script><!--\"'&\\\u2028\u2029{{model.js}}\n"


def test_no_vocabulary_and_no_name_breaks_out_of_the_data(random_model):
    vocab = Vocabulary(HOSTILE.replace(".", ""))
    name = HOSTILE.replace(".", "")
    html = page_html(random_model(vocab_size=len(vocab)), vocab, name)
    data = data_of(html)
    assert (data["name"], data["characters"]) == (name, vocab.characters)
    assert html.count("<script") == html.count("</script>") == 3
    assert html.isascii() or not set(html) & set("\u2028\u2029")


def test_page_html_names_what_is_wrong(random_model):
    vocab = Vocabulary("abc")
    with pytest.raises(NamesError, match="character 'm' at position 1 is not in the vocabulary 'abc'") as caught:
        page_html(random_model(vocab_size=4), vocab, "ambc")
    assert isinstance(caught.value, WaveNetConvError)
    with pytest.raises(ConfigError, match="the vocabulary has 4 tokens and the model 5"):
        page_html(random_model(vocab_size=5), vocab, "abc")
    with pytest.raises(ConfigError, match="the model is a Linear, not a ConvWaveNet"):
        page_html(torch.nn.Linear(1, 1), vocab, "abc")
    for character in "\ud83d\ude00":  # one character in JavaScript, if they are together
        with pytest.raises(ConfigError, match=rf"its vocabulary has '\\u{ord(character):x}', half of a"):
            page_html(random_model(vocab_size=4), Vocabulary("ab" + character), "ab")


@pytest.mark.parametrize(
    ("place", "parameter"),
    [("embedding", "embedding.weight"), ("layer 2", "layers.1.conv.weight"), ("head", "head.bias")],
)
@pytest.mark.parametrize("value", [nan, -inf, 1e39])  # float32 ends at 3.4e38
def test_weights_that_are_not_finite_are_rejected(random_model, place, parameter, value):
    model = random_model(vocab_size=4, dtype=torch.float64, kernel_sizes=(2, 2))
    model.get_parameter(parameter).data.view(-1)[1] = value
    with pytest.raises(ConfigError, match=f"its {place} has a NaN or an infinite number in float32; train it again"):
        page_html(model, Vocabulary("abc"), "abc")


def test_quantiles_that_are_not_finite_are_rejected(random_model):
    with pytest.raises(ConfigError, match="its list of quantiles has a NaN or an infinite number"):
        page_html(random_model(vocab_size=4), Vocabulary("abc"), "abc", torch.tensor([1, inf]))
