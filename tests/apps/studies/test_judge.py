import pytest
from scipy import stats

from anynorm.apps.studies.compare.effects import say_effects
from anynorm.apps.studies.compare.judge import Choice, choose_all, cover, find_common
from anynorm.apps.studies.compare.sentences import say_choice
from anynorm.apps.studies.compare.verdict import say_model_verdict, say_unjudged, say_verdict
from anynorm.apps.studies.intervals import Interval, compare_pair, find_interval
from anynorm.apps.studies.metrics import Metric
from anynorm.apps.terminal import join_words


def test_interval_is_students():
    values = [1.0, 2.0, 4.0, 4.5]
    found = find_interval(values)
    low, high = stats.t.interval(0.95, 3, stats.tmean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_has_no_interval():
    found = find_interval([3.0])
    assert (found.low, found.high, found.verdict) == (None, None, "not judged")
    assert find_interval([]) is None


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ({0: 5.0, 1: 6.0, 2: 7.0}, {0: 4.0, 1: 5.1, 2: 5.9}, "higher"),
        ({0: 4.0, 1: 5.1, 2: 5.9}, {0: 5.0, 1: 6.0, 2: 7.0}, "lower"),
        ({0: 5.0, 1: 6.0, 2: 7.0}, {0: 7.0, 1: 5.0, 2: 6.0}, "no clear difference"),
        ({0: 5.0, 1: 6.0, 2: 7.0}, {0: 5.0, 1: 6.0, 2: 7.0}, "no clear difference"),
        ({0: 99.0, 1: 98.0}, {0: 5.0, 1: 4.1}, "not judged"),
        ({0: 5.0, 1: 6.0}, {0: 1.0}, "not judged"),
    ],
)
def test_pairs_are_taken_seed_by_seed(first, second, verdict):
    assert compare_pair(first, second, 0.1).verdict == verdict


def test_no_common_seed_is_no_comparison():
    assert compare_pair({0: 1.0}, {1: 1.0}) is None


def test_equal_differences_over_few_seeds_are_not_certainty():
    found = compare_pair({0: 95.2, 1: 96.2, 2: 94.0}, {0: 95.0, 1: 96.0, 2: 93.8}, 0.1)
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert found.verdict == "no clear difference"
    # Five seeds, or a larger difference, are more than one sample can explain.
    assert compare_pair(dict.fromkeys(range(5), 95.3), dict.fromkeys(range(5), 95.0), 0.1).verdict == "higher"
    assert compare_pair({0: 97.0, 1: 98.0, 2: 96.0}, {0: 95.0, 1: 96.0, 2: 94.0}, 0.1).verdict == "higher"
    # On fewer samples the same difference says less.
    assert compare_pair(dict.fromkeys(range(5), 95.3), dict.fromkeys(range(5), 95.0), 1.0).verdict != "higher"


def test_every_judged_difference_has_the_resolution_of_its_samples(make_findings):
    findings, _ = make_findings(seeds=2)
    for found in findings.finals.values():
        for record in found.values():
            record["test_score"] = round(record["test_score"])
            record["modes"] = {"evaluation_score": 0.9, "training_score": 0.9}
    quantile = stats.t.ppf(0.975, 1) / 2**0.5
    effect = findings.batch_effect("cnn", "layer")
    assert effect.high - effect.mean == pytest.approx(quantile * 100 / 1000)
    # The modes are compared on whole batches: 448 of the 500 validation samples at batch 64.
    modes = findings.mode_effect(("cnn", "64", "batch"))
    assert modes.high - modes.mean == pytest.approx(quantile * 100 / 448)
    differences = [interval for choice in choose_all(findings) for interval in choice.differences.values()]
    # All pairs of six norms hold together at 95 %; in the mlp there are five.
    quantile = stats.t.ppf(1 - 0.025 / 10, 1) / 2**0.5
    assert min(interval.high - interval.mean for interval in differences) == pytest.approx(quantile * 0.1)


def test_verdict_names_leader_and_worst(make_findings):
    findings, choices = make_findings()
    assert {choice.leader for choice in choices if choice.batch == "64"} == {"batch"}
    assert {choice.leader for choice in choices if choice.batch == "2"} <= {"layer", "rms", "group"}
    verdict = say_verdict(findings, choices)
    assert "batch norm in the" in verdict
    assert "at batch 2" in verdict
    assert say_unjudged(findings, choices) == ""


def test_one_seed_recommends_nothing(make_findings):
    findings, choices = make_findings(seeds=1)
    assert say_verdict(findings, choices).startswith("Nothing can be said from one seed")
    assert all("no interval" in say_choice(findings, choice) for choice in choices)
    small = [sentence for sentence in say_effects(findings) if sentence.startswith("Small batches")]
    assert small
    assert all("not judged" in sentence and "no interval" in sentence for sentence in small)


def test_places_where_a_norm_is_missing_are_left_out_of_the_verdict(make_findings):
    findings, choices = make_findings(
        finished=lambda run: not (run.final and run.batch == "2" and run.norm == "batch" and run.seed > 0)
    )
    assert "batch 2" not in say_verdict(findings, choices)
    assert "cnn at batch 2 and mlp at batch 2" in say_unjudged(findings, choices)


def test_nothing_finished_says_so(make_findings):
    findings, choices = make_findings(finished=lambda run: not run.final)
    assert say_verdict(findings, choices).startswith("No full run is finished")


def test_visible_effects_come_first(make_findings):
    findings, _ = make_findings()
    starts = [sentence.split(":")[0] for sentence in say_effects(findings)]
    order = ["Small batches", "Two modes", "Against no normalization", "Learning rates"]
    assert list(dict.fromkeys(starts)) == order


def choice(size, leader, proven=(), **others):
    differences = {norm: Interval(mean, mean - width, mean + width, 5) for norm, (mean, width) in others.items()}
    return Choice("mlp", size, leader, differences, 5, (), proven)


def test_as_few_norms_as_possible_answer():
    small, wide = (0.4, 1.0), (5.0, 9.0)
    choices = [
        choice("64", "batch", group=wide, layer=wide),
        choice("8", "layer", batch=small, group=small),
        choice("2", "group", batch=(40.0, 2.0), layer=small),
    ]
    # Layer norm is nowhere clearly worse, but 5 points behind at batch 64, where the interval is wide.
    assert find_common(choices) == ["group", "layer"]
    assert cover(choices) == {"batch": ["64", "8"], "group": ["2"]}


def test_a_norm_that_clearly_beats_none_is_named_though_the_leader_does_not(make_findings):
    """Batch norm leads, but one bad seed leaves its gain unclear; layer norm gains less, seed after seed."""
    findings, _ = make_findings(("cnn",), seeds=5, batches=("64",))
    tests = {
        "none": (0.80, 0.81, 0.80, 0.79, 0.80),
        "batch": (0.92, 0.93, 0.92, 0.91, 0.71),
        "layer": (0.87, 0.88, 0.86, 0.86, 0.87),
    }
    for (_, _, norm), found in findings.finals.items():
        for seed, record in found.items():
            record["test_score"] = tests.get(norm, tests["none"])[seed]
            record["validation_score"] = {"batch": 0.92, "layer": 0.87}.get(norm, 0.8)
    choices = choose_all(findings)
    assert [(found.leader, found.proven) for found in choices] == [("batch", ("layer",))]
    assert "none" in choices[0].equals
    verdict = say_verdict(findings, choices)
    assert verdict.startswith("For the cnn, use layer norm at batch 64 (batch norm")
    assert "no normalization" not in verdict
    assert "than none" not in verdict


WIDE, NEAR = (5.0, 9.0), (0.4, 1.0)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([choice("64", "batch", none=NEAR), choice("2", "none", batch=NEAR)], "no norm was clearly better than none"),
        # One norm beats none at one batch size: enough to name it.
        (
            [choice("64", "batch", ("layer",), none=WIDE, layer=WIDE), choice("2", "batch", none=WIDE, layer=NEAR)],
            "use layer norm at every batch size tested (batch norm is not clearly worse)",
        ),
        ([choice("64", "none", ("layer",), layer=(-3.0, 1.0), batch=NEAR)], "use layer norm at batch 64"),
        # Of two that beat none the one near the leader answers, though more are not clearly worse.
        (
            [choice("64", "batch", ("layer", "rms"), none=WIDE, layer=WIDE, rms=NEAR)],
            "use RMS norm at batch 64 (batch norm and layer norm are not clearly worse)",
        ),
        # A margin wider than the difference is no answer.
        ([choice("64", "batch", layer=NEAR)], "no clear difference between batch norm and layer norm at batch 64"),
        # None is not the answer where norms clearly beat it, though it would answer for two batch sizes at once.
        (
            [
                choice("64", "batch", ("batch",), none=(9.0, 1.0)),
                choice("8", "layer", ("layer",), none=NEAR, batch=WIDE),
                choice("2", "rms", ("rms",), none=NEAR, batch=WIDE),
            ],
            "use batch norm at batch 64, layer norm at batch 8 and RMS norm at batch 2",
        ),
    ],
)
def test_the_verdict_on_none_is_what_the_data_supports(make_findings, choices, said):
    findings, _ = make_findings()
    found = say_model_verdict(findings, "mlp", choices)
    assert said in found
    assert ("than none" in found) == ("than none" in said)


def test_words():
    assert join_words(["a, x", "b", "c"]) == "a, x, b and c"
    assert join_words(["a"]) == "a"
    assert join_words([]) == ""
    assert Metric().write_gain(-0.04) == "0.0"
    assert Metric().write_gain(-1.25) == "−1.2"
