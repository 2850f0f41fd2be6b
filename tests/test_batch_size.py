"""examples/batch_size.py: arms are paired, ghosts are micro-batches, and sentences follow the numbers.

Of the three kinds of tests these keep an invariant.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import anynorm

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mlxtend", "scipy", "matplotlib")),
    reason="the example needs the packages of anynorm[compare]",
)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("batch_size", "batch_size_run", "batch_size_plot")
    modules = [importlib.import_module(name) for name in names]
    monkeypatch.setattr(modules[1], "IMAGES", 64)
    modules[1].load.cache_clear()
    yield modules
    modules[1].load.cache_clear()
    for name in names:
        sys.modules.pop(name)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_arms_start_alike_and_are_repeatable(example, network):
    run = example[1]
    arms = {"ghost": 4, "renorm": 4, "group": 32, "layer": 32}
    starts = [run.build(run.Job(network, arm, size, 0.1, 3, 1), arm) for arm, size in arms.items()]
    first, *others = ([p for p in net.parameters() if p.dim() > 1] for net in starts)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    job = run.Job(network, "renorm", 8, 0.1, 0, 1, held_out=True)
    assert run.run_job(job) == run.run_job(job)


def test_ghosts_are_micro_batches_of_batch_norm(example):
    """To rounding: the network that ghosts trained and one that batch norm trained on micro-batches."""
    run = example[1]
    job = run.Job("mlp", "ghost", 8, 0.03, 0, 1)
    ghost = run.fit(job, run.load())
    micro = run.build(job, "ghost")
    for norm in micro.modules():
        if isinstance(norm, anynorm.GhostBatchNorm1d):
            norm.ghost_size = 32  # never full: batch norm of what it gets
    optimizer = torch.optim.SGD(micro.parameters(), job.rate, run.SGD_MOMENTUM)
    generator, data = torch.Generator().manual_seed(0), run.load()
    for chosen in torch.randperm(64, generator=generator).split(32):
        optimizer.zero_grad()
        for part in chosen.split(8):
            (torch.nn.functional.cross_entropy(micro(data["x"][part]), data["y"][part]) / 4).backward()
        optimizer.step()
    for mine, its in zip(ghost.state_dict().values(), micro.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


def test_recalibration_is_an_evaluation_of_the_same_training(example, monkeypatch):
    calls = []
    monkeypatch.setattr(anynorm, "recalibrate", lambda *given, **_: calls.append(given), raising=False)
    outcome = example[1].run_job(example[1].Job("mlp", "ghost", 8, 0.1, 0, 1))
    assert outcome.error == outcome.recalibrated  # nothing was recalibrated here
    (network, batches), *more = calls
    assert not more and sum(map(len, batches)) == 64
    assert {type(m) for m in network.modules() if hasattr(m, "running_mean")} == {anynorm.BatchNorm1d}


def make_results(main, run) -> dict:
    """Batch norm is 10 points worse at 2, seed by seed; group norm is 9 everywhere."""
    errors = {"ghost": {2: 18.0}, "group": {32: 9.0}}
    return {
        (network, arm, size): main.Cell(
            network,
            arm,
            size,
            0.03,
            tuple(
                run.Outcome(
                    0.1, errors.get(arm, {}).get(size, 8.0) + seed / 10 + (size == 2) * seed / 100, 7.0 + seed / 10
                )
                for seed in range(3)
            ),
        )
        for network in run.NETWORKS
        for arm, sizes in main.TRAINED.items()
        for size in sizes
    }


def test_sentences_and_table_follow_the_numbers(example, tmp_path, monkeypatch):
    main, run, _ = example
    results = make_results(main, run)
    sentences = main.judge(results)
    assert sentences[0].startswith("mlp: batch, running averages: 2 against 32: +10.0 (") and "higher" in sentences[0]
    assert "at 2 against group norm: +9.0" in sentences[0]
    assert "mlp: batch, recalibrated: 2 against 32: +0.0" in sentences[1] and "no clear difference" in sentences[1]
    assert sentences[3] == "mlp: group: does not depend on the size."
    page = tmp_path / "page.md"
    page.write_text(f"before\n{main.MARKS[0]}old\n{main.MARKS[1]}\nafter\n")
    for name, path in (("PAGE", page), ("PICTURE", tmp_path / "p.svg"), ("NUMBERS", tmp_path / "n.json")):
        monkeypatch.setattr(main, name, path)
    main.write_page(results)
    main.write_numbers(results, 3, 1, 2)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| mlp: batch, running averages | 8.1±" in text and "| cnn: layer | 8.1±" in text
    assert (tmp_path / "p.svg").read_text().count("<svg") == 1
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["seeds"] == [0, 1, 2] and len(numbers["cells"]) == len(results)
    assert {"torch", "numpy", "anynorm", "python"} == set(numbers["versions"])


def test_the_page_shows_what_the_numbers_say(example):
    """The table in docs/small-batch.md is the one of examples/batch_size.json."""
    main, run, _ = example
    cells = [
        main.Cell(**{**cell, "outcomes": tuple(run.Outcome(**outcome) for outcome in cell["outcomes"])})
        for cell in json.loads(main.NUMBERS.read_text())["cells"]
    ]
    results = {(cell.network, cell.arm, cell.size): cell for cell in cells}
    assert main.write_table(results) in main.PAGE.read_text()
