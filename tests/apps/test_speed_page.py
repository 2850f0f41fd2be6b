"""The page of `anynorm speed --html`: one file, legible in both colour schemes, with the numbers that were measured."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import anynorm
from anynorm.apps import cli
from anynorm.apps.speed import layers, training
from anynorm.apps.timing.cases import MODES, Case
from anynorm.apps.timing.forms import ACCELERATED, AGAIN, BUILT, make_forms
from anynorm.apps.timing.interleaved import InterleavedTimings
from anynorm.engine.allocator import AllocatorReport
from anynorm.errors import UserError

page = pytest.importorskip("anynorm.apps.speed.page", reason="the page needs matplotlib: pip install '.[compare]'")
pytestmark = pytest.mark.usefixtures("one_thread")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>alert(1)</script> & $x$"
CASE = Case("tiny", "BatchNorm2d", (4,), (6, 4, 2, 2), channels_last=True)


@pytest.fixture
def written():
    """A page of made-up times: torch 20 us, anynorm 10 us, a copy 1 us."""
    timings = InterleavedTimings({"copy": [1e-6] * 3, "torch": [2e-5] * 3, "anynorm": [1e-5] * 3})
    measured = [layers.LayerTimes(CASE, dict.fromkeys(MODES, timings))]
    forms = make_forms(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 3))
    times = InterleavedTimings({BUILT: [0.03] * 3, AGAIN: [0.03] * 3, ACCELERATED: [0.02] * 3})
    steps = [training.StepTimes(EVIL, forms, times, f"it was {EVIL}")]
    return page.write_page(measured, steps, {"processor": EVIL})


class Reader(HTMLParser):
    """What a page loads, and its open elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_complete_loads_nothing_and_escapes_what_is_not_ours(written):
    reader = Reader()
    reader.feed(written)
    assert not reader.open
    assert all(url.startswith(("#", "data:,")) for url in reader.loads)
    assert "url(http" not in written
    assert "script" not in reader.tags
    assert reader.tags.count("figure") == 4
    assert EVIL not in written
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x$" in written


def test_the_page_holds_the_numbers_and_what_disturbed_them(written):
    assert "2.00 in evaluation, 2.00 in training and 2.00 in forward with backward" in written
    for text in ("20 us", "10 us", "30 ms, 1.00 times as fast", "20 ms, 1.50 times as fast", "batch 6x4x2x2, last"):
        assert f">{text}</text>" in written
    assert "The machine was busy: it was " in written


def test_every_colour_is_one_of_the_style_which_has_two_schemes(written):
    drawn = "".join(re.findall(r"<svg.*?</svg>", written, re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): *(#[0-9a-f]+)", drawn)) <= {"#000000"}
    used = set(re.findall(r"var\(--([a-z]+)\)", drawn))
    assert used == {"torch", "ours", "limit", "label", "edge", "grid"}
    light, _, dark = written.partition("@media (prefers-color-scheme: dark)")
    assert all(f"--{name}:" in light and f"--{name}:" in dark for name in used)


def test_the_command_writes_it(monkeypatch, tmp_path):
    monkeypatch.setattr("anynorm.apps.speed.speed.CASES", (CASE,))
    monkeypatch.setattr(training, "MODELS", {"small": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))})
    monkeypatch.setattr(anynorm, "tune_allocator", lambda keep_large: AllocatorReport({}, False, "not in a test"))
    out = tmp_path / "$mine.html"
    printed = CliRunner().invoke(
        cli.app, ["speed", "--seconds", "0.1", "--batch", "2", "--side", "32", "--html", str(out)]
    )
    assert printed.exit_code == 0, printed.exception
    assert "page: " in printed.stdout
    assert "small" in out.read_text()


@pytest.mark.parametrize(
    ("name", "words"), [("page.txt", "a page ends in .html"), ("nowhere/page.html", "there is no folder")]
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(name, words, tmp_path):
    from anynorm.apps.speed.speed import print_speed

    with pytest.raises(UserError, match=words):
        print_speed(html=tmp_path / name)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium")
def test_chromium_draws_it(written, tmp_path):
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(written, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    options += ["--enable-logging=stderr", "--window-size=1300,1200", f"--screenshot={picture}"]
    done = subprocess.run(
        [str(CHROMIUM), *options, path.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    assert "CONSOLE" not in done.stderr
    assert Path(picture).stat().st_size > 20_000
