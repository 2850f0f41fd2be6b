import pytest
from scipy import stats

from anynorm.studies.judge import Choice, Interval, compare_pair, cover, find_common, find_interval
from anynorm.studies.sentences import join, say_choice, say_effects, say_unjudged, say_verdict, signed


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
        ({0: 5.0, 1: 6.0}, {0: 5.0, 1: 6.0}, "no clear difference"),
        ({0: 5.0, 1: 6.0}, {0: 1.0}, "not judged"),
    ],
)
def test_pairs_are_taken_seed_by_seed(first, second, verdict):
    assert compare_pair(first, second).verdict == verdict


def test_no_common_seed_is_no_comparison():
    assert compare_pair({0: 1.0}, {1: 1.0}) is None


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
    assert say_verdict(findings, choices).startswith("Nothing can be recommended from one seed")
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


def choice(size, leader, **others):
    differences = {norm: Interval(mean, mean - width, mean + width, 5) for norm, (mean, width) in others.items()}
    return Choice("mlp", size, leader, differences, 5, ())


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


def test_words():
    assert join(["a, x", "b", "c"]) == "a, x, b and c"
    assert join(["a"]) == "a"
    assert join([]) == ""
    assert signed(-0.04) == "0.0"
    assert signed(-1.25) == "−1.2"
