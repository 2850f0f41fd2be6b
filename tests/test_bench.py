"""The benchmark: its grid is what was promised, verdicts follow from the numbers, and its outputs are complete.

Of the three kinds of tests these keep an invariant; times are made up wherever a number is checked.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from concurrent.futures import BrokenExecutor
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import anynorm
from anynorm.apps.timing import limits
from anynorm.apps.timing.cases import MODES, Case
from anynorm.apps.timing.interleaved import InterleavedTimings
from anynorm.engine import kernels
from anynorm.errors import UserError
from bench_rows import make_row
from benchmarks import (
    bench,
    machine,
    masked,
    measure,
    page,
    peers,
    plot,
    results,
    tables,
    verdicts,
)
from benchmarks.grid import BATCHES, find_cases
from benchmarks.results import Row

CACHE = 32 << 20
TINY = Case("tiny", "BatchNorm1d", (4,), (6, 4))

pytestmark = pytest.mark.usefixtures("one_thread")

# The grid


def test_the_grid_holds_what_the_issue_lists():
    cases = find_cases()
    assert len(set(cases)) == len(cases)
    for place in ("ResNet-50", "MobileNetV2"):
        found = {(case.shape[0], case.layout) for case in cases if case.place == place and case.norm == "batch"}
        assert found == {(batch, layout) for batch in BATCHES for layout in ("contiguous", "channels_last")}
    kinds = {(case.place, case.norm, case.layout) for case in cases}
    for layout in ("contiguous", "channels_last"):
        assert {("nnU-Net", "instance", layout), ("diffusion U-Net", "group", layout)} <= kinds
    for place in ("ViT-B", "language model 4096"):
        assert {(place, "layer", "contiguous"), (place, "rms", "contiguous")} <= kinds
    assert ("MLP", "batch", "contiguous") in kinds
    assert {norm for place, norm, _ in kinds if place == "tiny"} == {"batch", "layer", "rms", "group", "instance"}
    assert {(8, 16), (64, 768)} <= {case.shape for case in cases if case.place == "tiny"}
    assert {case.shape[2:] for case in cases if case.place == "ResNet-50"} >= {(7, 7), (112, 112)}
    assert MODES == ("evaluation", "training", "forward+backward")


def test_the_grid_is_the_same_in_bfloat16_and_the_quick_one_has_every_network_and_layout():
    cases = find_cases()
    half = find_cases(torch.bfloat16)
    assert [dataclasses.replace(case, dtype=torch.float32) for case in half] == cases
    quick = find_cases(quick=True)
    assert 15 <= len(quick) <= 30
    for chosen in (lambda case: case.place, lambda case: (case.norm, case.layout)):
        assert set(map(chosen, quick)) == set(map(chosen, cases))
    assert any(limits.is_out_of_cache(case, CACHE) for case in quick)


def test_resnet_shapes_are_those_of_the_network():
    """Forward hooks on torch's own layers would need torchvision; the stages' widths and sides are arithmetic."""
    stages = {56: (64, 256), 28: (128, 512), 14: (256, 1024), 7: (512, 2048), 112: (64,)}
    for case in find_cases():
        if case.place == "ResNet-50":
            assert case.shape[1] in stages[case.shape[2]], case.name


# Limits


@pytest.mark.parametrize(
    ("case", "passes"),
    [
        (Case("", "BatchNorm2d", (4,), (2, 4, 8, 8)), (2, 2, 5)),
        (Case("", "BatchNorm2d", (64,), (32, 64, 112, 112)), (2, 3, 8)),
        (Case("", "LayerNorm", (4096,), (2, 2048, 4096)), (2, 2, 5)),
        (Case("", "InstanceNorm3d", (64,), (2, 64, 64, 64, 64)), (2, 2, 5)),
        (Case("", "InstanceNorm3d", (64,), (2, 64, 64, 64, 64), channels_last=True), (3, 3, 8)),
    ],
)
def test_least_bytes(case, passes):
    """In passes over x: forward in evaluation and training, then with backward; more where a pool exceeds the cache."""
    assert tuple(limits.find_bytes(case, mode, CACHE) / case.size for mode in MODES) == passes


def test_caches_are_read_as_the_system_writes_them(tmp_path):
    for index, (level, kind, size) in enumerate(
        (("1", "Data", "32K"), ("1", "Instruction", "64K"), ("3", "Unified", "8M"))
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    caches = limits.find_caches(tmp_path)
    assert caches == {"L1": 32 << 10, "L3": 8 << 20}
    assert limits.find_last_level(caches) == 8 << 20
    assert limits.find_last_level(limits.find_caches(tmp_path / "nowhere")) == limits.ASSUMED_CACHE


# Rows


def test_rows_follow_from_rounds():
    rounds = InterleavedTimings({"anynorm": [4e-6] * 3, "torch": [6e-6, 8e-6, 10e-6], "copy": [1e-6] * 3})
    ours, theirs = results.make_rows(TINY, "training", rounds, {"torch": 7}, CACHE)
    assert (ours.peer, ours.ratio, ours.kept) == ("anynorm", 1.0, 0)
    assert (theirs.peer, theirs.ratio, theirs.ratio_q1, theirs.ratio_q3, theirs.kept) == ("torch", 2.0, 1.75, 2.25, 7)
    assert (theirs.q1_us, theirs.median_us, theirs.q3_us) == (7.0, 8.0, 9.0)
    assert (ours.bytes, ours.limit_us, ours.share) == (2 * TINY.size, 1.0, 0.25)


# Outputs


def test_csv_has_the_facts_and_every_column_and_is_read_back(tmp_path):
    rows = [make_row(1.5), make_row(1.0, "anynorm", out_of_cache=True)]
    facts = machine.find_facts()
    path = tmp_path / "new" / "run.csv"
    results.write_csv(rows, facts, path)
    header = next(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert header.split(",") == [field.name for field in dataclasses.fields(Row)]
    assert results.read_csv(path) == (rows, facts)
    assert {"cpu", "cores", "caches", "threads", "kernels", "allocator", "torch", "jax", "python"} <= set(facts)
    assert "/" not in facts["kernels"] + facts["system"] + facts["allocator"]


def test_page_is_made_anew_between_its_markers_only():
    rows = [make_row(2.0, mode=mode, peer=peer) for mode in MODES for peer in ("anynorm", "torch", "jax")]
    facts = {"date": "2000-01-01", "run": "a run", "other work meanwhile": "1 %"}
    text = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
    written = page.write_page(text, rows, [], facts, verdicts.judge(rows, []))
    assert written.startswith("before\n<!-- bench -->\n")
    assert written.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in written
    assert "| ResNet-50 | batch 8x4x2x2 | 2.00 | 2.00 | 2.00 | 2.00 |" in written
    assert "| **all** | 2.00, worst 2.00, lost 0/1 |" in written
    assert page.write_page(written, rows, [], facts, verdicts.judge(rows, [])) == written
    with pytest.raises(ValueError, match=r"docs/speed\.md"):
        page.write_page("no markers", rows, [], facts, [])


def test_the_page_in_the_docs_has_a_verdict_for_every_goal():
    text = page.PAGE.read_text()
    for verdict in verdicts.judge([], []):
        assert f"| {verdict.goal} |" in text
    assert page.PICTURE.exists()


def test_plot_names_every_network_and_the_worst_case(tmp_path):
    rows = [make_row(2.0, mode=mode) for mode in MODES]
    rows += [make_row(0.25, mode=MODES[0], place="tiny", shape="8x16"), make_row(3.0, "jax", mode=MODES[1])]
    plot.draw(rows, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    for text in ("ResNet-50, batch", "tiny, batch", "0.25: batch 8x16", "torch eager", "JAX", *MODES):
        assert text in drawn


def test_other_work_is_said_aloud():
    assert machine.describe_load(0.01) == "1 % of the processors"
    assert "repeat" in machine.describe_load(0.5)
    share = machine.Watch().find_share()
    assert share is None or 0 <= share <= 1


# The command


def test_peers_are_checked_and_a_missing_jax_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    chosen, sentence = peers.choose_peers("anynorm,torch,jax")
    assert chosen == ["anynorm", "torch"]
    assert "JAX is not measured" in sentence
    for names in ("anynorm,tensorflow", "torch"):
        with pytest.raises(UserError, match="--peers takes anynorm and any of"):
            peers.choose_peers(names)


@pytest.mark.parametrize(("dtypes", "only", "text"), [("float8", "", "--dtypes"), ("float32", "vgg", "--only")])
def test_what_cannot_be_measured_is_refused_in_one_sentence(dtypes, only, text):
    with pytest.raises(UserError, match=text):
        bench.choose_plan(dtypes, quick=False, only=only)


def test_results_are_named_by_date_processor_and_options():
    facts = {"date": "2000-01-01", "cpu": "AMD EPYC(tm) 1"}
    assert bench.name_results(facts, bench.describe_options(False, "", None)) == "2000-01-01-amd-epyc-tm-1.csv"
    name = bench.name_results(facts, bench.describe_options(True, "7x7", 1))
    assert name == "2000-01-01-amd-epyc-tm-1-quick-7x7-1-threads.csv"


def run(*cases: Case, peers: str = "anynorm,torch") -> bench.Found:
    return bench.run(Console(quiet=True), bench.Plan([*cases], {}), peers.split(","), seconds=0.0)


def test_a_run_measures_every_mode_and_peer():
    peers = ("anynorm", "kernel", "fresh", "torch") if not kernels.OFF else ("anynorm", "torch")
    found = run(TINY, peers=",".join(peers))
    assert not found.problems
    assert [(row.mode, row.peer) for row in found.rows] == [(mode, peer) for mode in MODES for peer in peers]
    for row in found.rows:
        assert 2 <= row.rounds <= 5  # two where the machine stands still for seconds
        assert 0 < row.q1_us <= row.median_us <= row.q3_us
        assert (row.kept > 0) == (row.mode == verdicts.BOTH and row.peer in ("anynorm", "torch"))
    titles, cells = tables.list_measured(found.rows)
    assert {len(line) for line in cells} == {len(titles)}


def test_a_whole_run_compiles_where_a_goal_is_and_on_the_quick_cases():
    case, peers = find_cases(quick=True)[0], ["anynorm", "torch", "compile", "jax", "anynorm-compile"]
    for changes, modes in (({}, MODES), ({"quick": False}, MODES[2:]), ({"dtype": torch.bfloat16}, MODES[2:])):
        other = dataclasses.replace(case, **changes)
        for mode in MODES:
            assert measure.spare(peers, other, mode) == (peers if mode in modes else peers[:2])
    assert bench.choose_plan("", quick=False, only="").sparing
    assert not bench.choose_plan("", quick=False, only="resnet").sparing
    assert not bench.choose_plan("", quick=True, only="").sparing


def test_a_whole_run_has_bfloat16_on_the_quick_cases_only():
    plan = bench.choose_plan("", quick=False, only="")
    halves = [case for case in plan.cases if case.dtype == torch.bfloat16]
    assert halves == find_cases(torch.bfloat16, quick=True)
    assert plan.cases[: -len(halves)] == find_cases()
    assert f"({len(halves)} of them in bfloat16) and 9 whole models" in plan.describe()
    assert bench.choose_plan("bfloat16", quick=False, only="").cases == find_cases(torch.bfloat16)


def test_the_second_process_keeps_memory_or_says_why_not():
    found = run(TINY, peers="anynorm,tuned")
    if found.problems:
        assert found.problems[0].startswith("no memory is kept: ")
        return
    expected = [(mode, peer) for mode in MODES for peer in ("anynorm", "anynorm-tuned", "torch-tuned")]
    assert [(row.mode, row.peer) for row in found.rows] == expected
    assert {row.ratio for row in found.rows if row.peer == "anynorm-tuned"} == {1.0}


def test_a_second_process_that_ends_leaves_the_rest(monkeypatch):
    def end(*_):
        raise BrokenExecutor("it is gone")

    process, problems = SimpleNamespace(submit=end), []
    rows = next(measure.measure([TINY], ["anynorm", "torch"], 0.0, CACHE, problems.append, process=process))
    assert {(row.mode, row.peer) for row in rows} == {(mode, peer) for mode in MODES for peer in ("anynorm", "torch")}
    assert len(problems) == 1
    assert "BrokenExecutor: it is gone" in problems[0]


def test_a_run_that_is_stopped_keeps_what_there_is(monkeypatch):
    made, asked = measure.time_mode, []

    def stop(case, *rest):
        asked.append(case)
        if case.name != TINY.name:
            raise KeyboardInterrupt
        return made(case, *rest)

    monkeypatch.setattr(measure, "time_mode", stop)
    found = run(TINY, dataclasses.replace(TINY, shape=(7, 4)), TINY)
    assert found.problems == ["stopped before the end"]
    assert len(found.rows) == 6
    assert len(asked) == 4


def test_cases_are_left_out_when_the_time_is_over():
    plan = bench.Plan([TINY, TINY], {})
    found = bench.run(Console(quiet=True), plan, ["anynorm", "torch"], seconds=0.0, end=0.0)
    assert (found.rows, found.problems, found.left_out) == ([], [], [TINY, TINY])
    assert bench.describe_left_out(found) == "; the time was over before the last 2 cases"
    assert bench.describe_left_out(run(TINY)) == ""


def test_ctrl_c_ends_a_run_behind_the_case_that_is_timed(monkeypatch):
    made, asked = measure.time_mode, []

    def interrupt(case, *rest):
        asked.append(case)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return made(case, *rest)

    monkeypatch.setattr(measure, "time_mode", interrupt)
    before = signal.getsignal(signal.SIGINT)
    found = run(TINY, dataclasses.replace(TINY, shape=(7, 4)))
    assert found.problems == ["stopped before the end"]
    assert {row.shape for row in found.rows} == {"6x4"}
    assert len(found.rows) == 6
    assert signal.getsignal(signal.SIGINT) is before


def test_peers_that_compute_something_else_are_not_timed(monkeypatch):
    made = peers.make_call
    seen = []

    def make_wrong(module, parameters, mode, x, g):
        """Each peer's y is larger than the one before."""
        seen.append(mode)
        call, factor = made(module, parameters, mode, x, g), len(seen)
        return call if mode == verdicts.BOTH else lambda: call() * factor

    monkeypatch.setattr(peers, "make_call", make_wrong)
    found = run(TINY)
    assert len(found.problems) == 2
    assert "torch is" in found.problems[0] and "was not timed" in found.problems[0]
    assert {row.mode for row in found.rows} == {verdicts.BOTH}


def test_kept_counts_x_once_and_no_parameter():
    module = torch.nn.BatchNorm1d(4)
    x = torch.randn(6, 4, requires_grad=True)
    kept = peers.find_kept(lambda: torch.autograd.grad(module(x).sum(), x), module)
    assert kept == x.numel() * 4 + 2 * 4 * 4  # x, mean and 1/std


KINDS = [
    Case("", "BatchNorm2d", (6,), (3, 6, 2, 2)),
    Case("", "GroupNorm", (2, 6), (3, 6, 2, 2)),
    Case("", "InstanceNorm3d", (6,), (3, 6, 2, 2, 2)),
    Case("", "LayerNorm", (6,), (3, 2, 6)),
    Case("", "RMSNorm", (6,), (3, 2, 6)),
    Case("", "GroupNorm", (2, 6), (3, 6)),
]
KINDS += [dataclasses.replace(case, channels_last=True) for case in KINDS[:3]]


@pytest.mark.parametrize("case", KINDS, ids=lambda case: f"{case.name} {case.layout}")
@pytest.mark.parametrize("mode", MODES)
def test_every_peer_computes_the_same(case, mode):
    """Equals torch; JAX too, where the bench extra is installed."""
    chosen, _ = peers.choose_peers("anynorm,torch,jax" if kernels.OFF else "anynorm,kernel,fresh,torch,jax")
    with torch.set_grad_enabled(mode == verdicts.BOTH):
        contest = peers.make_contest(chosen, case, mode, case.draw())
    assert set(contest.calls) == {*chosen, "copy"}


def test_what_a_mask_costs_is_measured_for_every_norm():
    norms = {name for name, scheme in anynorm.FAMILY.items() if not scheme.variant_of}
    assert {case.norm for case in masked.CASES} == norms
    case = next(case for case in masked.CASES if case.place == "series")
    masks = masked.draw_masks(case)
    assert [name for name, mask in masks.items() if mask is None] == ["none"]
    assert float(masks["lengths"].float().mean()) == pytest.approx(0.62, abs=0.02)
    row = masked.write_row(case, "training", masked.measure(case, "training", 0.01))
    assert row.count("|") == 7
    assert "<!-- masked -->" in masked.PAGE.read_text()
