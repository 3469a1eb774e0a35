"""Writes the page of `wavenet-conv page` into the built site, where playground.md shows it."""

from pathlib import Path
from typing import Any

from wavenet_conv import load_checkpoint
from wavenet_conv.page import page_html


def on_post_build(config: Any) -> None:
    """Called by MkDocs when all pages are written."""
    trained = load_checkpoint("default")
    page = page_html(trained.model, trained.vocab, quantiles=trained.quantiles)
    (Path(config.site_dir) / "page.html").write_text(page, encoding="utf-8")
