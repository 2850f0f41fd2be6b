"""The page: one file, everything visible in a real browser, and names that stay text."""

import re

import pytest
from browser import look, needs_chromium

from anynorm.apps.studies.compare.findings import plain_sizes
from anynorm.apps.studies.compare.plots import find_limits
from anynorm.apps.studies.compare.report import write_report
from anynorm.apps.studies.plots import COLOURS

EVIL = ["<img src=x onerror=alert(1)>", "a\"b'c&lt;</svg><script>alert(2)</script>$x_1$"]


@pytest.fixture(scope="module")
def page(make_findings, make_results):
    findings, choices = make_findings(EVIL, batches=("64", "2", "64:8"))
    return write_report(findings, choices, make_results(findings, choices, data="<b>data</b>.npz"))


def test_the_page_is_one_file_without_scripts(page):
    assert "<script" not in page
    for loaded in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert loaded.startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_names_are_escaped(page):
    for name in (*EVIL, "<b>data</b>"):
        assert name not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_order_verdict_table_plots_method_limits(page):
    places = [page.index(mark) for mark in ('class="verdict"', "<table", "<figure", "How it was done", "Limits")]
    assert places == sorted(places)


def test_the_method_says_how_short_runs_and_equal_differences_count(page):
    assert "60 steps at least, or the whole run, where that is shorter" in page
    assert "their standard deviation counts as one test sample (0.1 points) at least" in page


def test_every_plot_has_words(page):
    labels = re.findall(r'<div role="img" aria-label="([^"]*)"', page)
    assert len(labels) == page.count("<figure>") == 2 * (1 + 1 + 2 * 4 + 3 + 2)
    assert all(len(label) > 40 for label in labels)


def test_missing_failed_and_impossible_cells(make_findings, make_results):
    findings, choices = make_findings(finished=lambda run: run.norm != "rms")
    page = write_report(findings, choices, make_results(findings, choices))
    rows = dict(re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', page.split("mlp: test accuracy")[1], re.DOTALL))
    assert re.sub("<[^>]*>", "", rows["rms"]).strip() == ""
    assert rows["instance"].count("n/a") == 2
    assert "no room" in page


def test_a_page_without_any_full_run(make_findings, make_results):
    findings, choices = make_findings(finished=lambda run: False)
    page = write_report(findings, choices, make_results(findings, choices))
    assert "No full run is finished" in page
    assert "<figure" not in page


def test_limits_keep_every_seed_in_sight():
    assert find_limits([90.0, 91.0]) == (85.5, 95.5)
    low, high = find_limits([10.0, 99.5])
    assert low <= 10
    assert 99.5 < high <= 101


def test_colours_differ_for_every_norm(make_findings):
    findings, _ = make_findings()
    assert len({COLOURS[norm] for norm in findings.plan.norms}) == 6
    assert plain_sizes(findings.plan) == ["64", "2"]


@needs_chromium
@pytest.mark.parametrize("width", [1200, 390])
def test_chromium_shows_every_plot_and_no_error(page, tmp_path, width):
    answer = look(page, tmp_path, width)
    assert len(answer["plots"]) == 30
    assert answer["captions"] == [f"{name}: test accuracy, %" for name in EVIL]
    assert EVIL[0] in answer["verdict"]
