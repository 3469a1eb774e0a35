"""A real browser for the tests of the page, and pages that fail their test when the browser complains."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from wavenet_conv import ConvWaveNet, WaveNetConfig, load_checkpoint
from wavenet_conv.model import BatchNorm
from wavenet_conv.page import page_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="session")
def browser():
    """Chromium by Playwright; a machine without one fails."""
    path = os.environ.get("WAVENET_CONV_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail("no Chromium: install the package chromium, or set WAVENET_CONV_CHROMIUM to the path of one")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("no Playwright: pip install 'wavenet-conv[browser]'")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens HTML in a new window: of 1,280 x 800 pixels, without motion unless options of Playwright say otherwise."""
    opened, complaints = [], []

    def call(html: str, **options):
        path = tmp_path / f"{len(opened)}.html"
        path.write_text(html, "utf-8")
        options = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | options
        opened.append(browser.new_context(**options))
        window = opened[-1].new_page()
        window.clock.install()
        window.on("console", lambda message: complaints.append(message.text))
        window.on("pageerror", lambda error: complaints.append(str(error)))
        window.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        window.on("request", lambda request: request.url == path.as_uri() or complaints.append(request.url[:99]))
        window.goto(path.as_uri())
        return window

    yield call
    for context in opened:
        context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def default_html() -> str:
    """The page of the model in the package."""
    checkpoint = load_checkpoint("default")
    return page_html(checkpoint.model, checkpoint.vocab, quantiles=checkpoint.quantiles)


@pytest.fixture
def window(show, default_html):
    """The page of the default model, with the name emma at its last output."""
    return show(default_html)


@pytest.fixture(scope="session")
def random_model():
    """A model with a config in which no weight, bias or running statistic has its initial value."""

    def build(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> ConvWaveNet:
        model = ConvWaveNet(WaveNetConfig(**{"n_embd": 6, "n_hidden": 8} | config), dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.6, generator=generator)
            for module in model.modules():
                if isinstance(module, BatchNorm):
                    module.running_mean.normal_(generator=generator)
                    module.running_var.uniform_(0.5, 1.5, generator=generator)
        return model.eval()

    return build
