"""The benchmark's verdicts follow from the numbers, all of which are made up here. It keeps an invariant."""

from __future__ import annotations

import dataclasses
import math

import pytest

from bench_rows import find_verdict, make_row
from benchmarks import causes, summaries, verdicts
from benchmarks.results import Row


def test_a_mean_comes_with_its_worst_case_and_its_losses():
    summary = summaries.summarize([make_row(8.0), make_row(0.5, shape="1x1"), make_row(0.96)])
    assert summary is not None
    assert math.isclose(summary.mean, (8 * 0.5 * 0.96) ** (1 / 3))
    assert (summary.worst, summary.losses, summary.count) == (0.5, 1, 3)
    assert summary.worst_name == "batch 1x1, forward+backward"


TINY_ROW = {"place": "tiny", "shape": "8x16"}


@pytest.mark.parametrize(
    ("goal", "wanted", "changes"),
    [
        ("forward + backward, torch eager", 2.2, {}),
        ("forward in training, torch eager", 2.6, {"mode": "training"}),
        ("evaluation, torch eager", 1.5, {"mode": "evaluation"}),
        ("tiny, layer norm, forward + backward", 1.0, TINY_ROW | {"norm": "layer"}),
        ("tiny, group norm, forward + backward", 1.2, TINY_ROW | {"norm": "group"}),
        ("tiny, batch norm, forward + backward", 1.4, TINY_ROW | {"norm": "batch"}),
        ("tiny, rms norm, forward + backward", 2.0, TINY_ROW | {"norm": "rms"}),
        ("tiny, forward without gradient", 1.5, TINY_ROW | {"mode": "training"}),
        ("tiny, forward without gradient", 1.5, TINY_ROW | {"mode": "evaluation", "norm": "rms"}),
        ("group norm, channels_last", 2.0, {"norm": "group", "layout": "channels_last"}),
        ("RMS norm, forward + backward", 5.0, {"norm": "rms"}),
        ("the better of torch.compile and JAX", 1.8, {"peer": "jax"}),
    ],
)
def test_means_are_met_or_missed_by_a_share(goal, wanted, changes):
    other = {"shape": "3x3"}
    rows = [make_row(4 * wanted, **changes), make_row(wanted / 4 * 1.01, **changes | other)]
    assert find_verdict(rows, goal).result == "met"
    missed = find_verdict([make_row(wanted * 0.8, **changes)], goal)
    assert missed.result == "missed by 20 %"
    assert missed.found.startswith(f"{wanted * 0.8:.2f} (worst {wanted * 0.8:.2f}: ")
    assert find_verdict([make_row(9.0, **changes | {"dtype": "bfloat16"})], goal).result == "not measured"
    mode = "evaluation" if changes.get("mode", verdicts.BOTH) == verdicts.BOTH else verdicts.BOTH
    assert find_verdict([make_row(9.0, **changes | {"mode": mode})], goal).result == "not measured"


def test_the_better_of_compile_and_jax_is_taken_case_by_case():
    rows = [
        *(make_row(ratio, peer) for ratio, peer in ((2.0, "compile"), (8.0, "jax"))),
        *(make_row(ratio, peer, shape="2x2") for ratio, peer in ((8.0, "compile"), (2.0, "jax"))),
    ]
    found = find_verdict(rows, "the better")
    assert (found.result, found.found[:5]) == ("met", "2.00 ")


def test_a_case_is_lost_where_anynorm_takes_more_than_a_twentieth_longer():
    goal = "cases slower"
    assert find_verdict([make_row(0.953), make_row(2.0)], goal).result == "met"
    small = {"place": "tiny", "norm": "layer", "shape": "8x16"}
    rows = [make_row(0.952), make_row(0.9, **small), make_row(0.9, **small | {"shape": "64x64"}), make_row(3.0)]
    found = find_verdict(rows, goal)
    assert found.result == "missed by 3 cases"
    assert found.found.startswith("3 of 4 (1 of them such layer norms), worst 0.90: layer 8x16")


def test_limits_are_judged_of_the_layer_out_of_cache_and_of_the_kernels_in_it():
    layer, kernel = make_row(peer="anynorm", out_of_cache=True), make_row(peer="kernel")
    for goal, row, wanted in (("larger than the last cache", layer, 1.4), ("kernels alone", kernel, 1.5)):
        near, far = dataclasses.replace(row, share=1.0), dataclasses.replace(row, share=1 / wanted**2)
        assert find_verdict([near, far], goal).result == "met"
        assert find_verdict([far], goal).result == f"missed by {100 * (wanted - 1):.0f} %"
        elsewhere = dataclasses.replace(far, out_of_cache=not row.out_of_cache)
        assert find_verdict([elsewhere], goal).result == "not measured"


def make_parts(kernel: float, fresh: float, **changes) -> list[Row]:
    """The rows of a case of which the kernels alone take these shares of 10 us."""
    shares = {"anynorm": 1.0, "kernel": kernel, "fresh": fresh}
    return [make_row(share, peer, **changes) for peer, share in shares.items()]


def test_a_missed_goal_names_the_worst_cases_and_where_their_time_goes():
    rows = [*make_parts(0.2, 0.5), make_row(0.5), *make_parts(0.5, 0.4, shape="2x2"), make_row(0.25, shape="2x2")]
    found = find_verdict(rows, "forward + backward, torch eager")
    assert found.causes == (
        "0.25 batch 2x2, forward+backward: kernel 50 %, memory 0 %, call 50 % of 10 us, limit 4 us; "
        "0.50 batch 8x4x2x2, forward+backward: kernel 20 %, memory 30 %, call 50 % of 10 us, limit 4 us"
    )
    over = find_verdict(rows, "kernels alone").causes
    assert over.startswith("2.50 batch 8x4x2x2, forward+backward: 10 us, limit 4 us; 2.50 batch 2x2")
    many = [row for n in range(4) for row in (*make_parts(0.2 * n, 1.0, shape=str(n)), make_row(1.0, shape=str(n)))]
    assert find_verdict(many, "forward + backward").causes.endswith(
        "; all 4 on average: kernel 30 %, memory 70 %, call 0 %"
    )
    assert find_verdict([make_row(9.0)], "forward + backward, torch eager").causes == ""
    assert (
        find_verdict([make_row(1.0)], "forward + backward, torch eager").causes
        == "1.00 batch 8x4x2x2, forward+backward"
    )
    parts = causes.find_causes(make_parts(1.2, 1.3))[make_row().key]
    assert parts.shares == (1.0, 0.0, 0.0), "kernels alone took longer than the layer, by chance"
