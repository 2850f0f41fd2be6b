"""The statistics of the studies on made-up data whose answer is known: intervals cover, verdicts are seldom false.

Each rate is of 4,000 repetitions with a fixed seed, so its standard error is 0.35 points at 5 %.
"""

import math

import numpy as np
import pytest

from anynorm.apps.studies.compare.findings import Findings
from anynorm.apps.studies.compare.judge import choose
from anynorm.apps.studies.compare.plan import Plan
from anynorm.apps.studies.intervals import find_interval, share_confidence
from anynorm.apps.studies.verdicts import (
    CONFIRMED,
    INCONCLUSIVE,
    REFUTED,
    Effect,
    Verdict,
    conclude,
    decide,
    difference,
    say_effect,
)

REPEATS = 4000
NOISE = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "uniform": lambda generator, shape: generator.uniform(-(3**0.5), 3**0.5, shape),
    "heavy tails": lambda generator, shape: generator.standard_t(5, shape) * 0.6**0.5,
}


def effects_of(values, threshold=0.0, least=0.0):
    """An Effect for each row: one value for each seed."""
    return [Effect("gain", dict(enumerate(row)), threshold, least=least) for row in np.atleast_2d(values)]


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("seeds", [4, 5, 10])
def test_intervals_cover_the_truth_95_times_in_100(noise, seeds):
    generator = np.random.default_rng(seeds)
    draws = 7.0 + 2.0 * NOISE[noise](generator, (REPEATS, seeds))
    intervals = [find_interval(list(row)) for row in draws]
    covered = np.mean([i.low <= 7.0 <= i.high for i in intervals])
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_verdicts_are_false_at_most_once_in_twenty_where_nothing_is_there(count, seeds, shared):
    """Every effect lies on its threshold, so each verdict is false; `shared` is the effects' correlation."""
    generator = np.random.default_rng([count, seeds, round(10 * shared)])
    own = generator.standard_normal((REPEATS, count, seeds))
    common = generator.standard_normal((REPEATS, 1, seeds))
    draws = shared**0.5 * common + (1 - shared) ** 0.5 * own
    false = np.mean([decide(effects_of(rows)) != INCONCLUSIVE for rows in draws])
    assert false <= 0.05 + 2 * 0.0035


def test_one_effect_that_is_there_does_not_confirm_two():
    """The first effect is large and the second lies on its threshold."""
    generator = np.random.default_rng(1)
    draws = generator.standard_normal((REPEATS, 2, 5)) + np.array([9.0, 0.0])[:, None]
    outcomes = [decide(effects_of(rows)) for rows in draws]
    assert outcomes.count(CONFIRMED) / REPEATS <= 0.025
    assert outcomes.count(REFUTED) / REPEATS <= 0.025


# Effect in standard deviations of one pair's difference, seeds, deciding effects: share of studies that confirm it.
POWER = [(2.0, 5, 1, 0.90), (2.0, 5, 2, 0.60), (3.0, 5, 2, 0.90), (1.0, 10, 1, 0.75), (4.0, 3, 1, 0.85)]


@pytest.mark.parametrize(("size", "seeds", "count", "power"), POWER)
def test_effects_that_matter_are_found(size, seeds, count, power):
    generator = np.random.default_rng([seeds, count])
    draws = size + generator.standard_normal((REPEATS, count, seeds))
    found = np.mean([decide(effects_of(rows)) == CONFIRMED for rows in draws])
    assert power <= found <= power + 0.15, "or the table says too little"
    missed = np.mean([decide(effects_of(-rows)) == REFUTED for rows in draws])
    assert missed >= power, "an effect of the other sign is refuted as surely"


@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0])
def test_values_on_a_grid_are_judged_with_its_step_in_mind(spread):
    """Both sides are rounded to a grid of step 1: equal differences over few seeds are chance."""
    generator = np.random.default_rng(round(10 * spread))
    truth = generator.uniform(0, 1, (REPEATS, 1))
    first, second = (np.round(truth + spread * generator.standard_normal((REPEATS, 5))) for _ in range(2))
    differences = first - second
    false = np.mean([e.outcome() != INCONCLUSIVE for e in effects_of(differences, least=6**-0.5)])
    assert false <= 0.05 + 2 * 0.0035


def test_without_the_step_equal_differences_would_decide():
    assert effects_of([1.0, 1.0, 1.0])[0].outcome() == CONFIRMED
    assert effects_of([1.0, 1.0, 1.0], least=6**-0.5)[0].outcome() == INCONCLUSIVE


def test_the_rule():
    above, below, wide = ([9.0, 10.0, 11.0], [-9.0, -10.0, -11.0], [-9.0, 1.0, 9.0])
    assert decide(effects_of(above)) == CONFIRMED
    assert decide(effects_of([above, below])) == REFUTED
    assert decide(effects_of([above, wide])) == INCONCLUSIVE
    assert decide(effects_of([below, wide])) == REFUTED
    assert decide([]) == INCONCLUSIVE
    assert decide(effects_of([5.0])) == INCONCLUSIVE, "one seed has no interval"
    assert decide([Effect("nothing", {})]) == INCONCLUSIVE
    assert decide(effects_of(above, threshold=50.0)) == REFUTED


def test_confidence_is_shared():
    assert share_confidence(1) == pytest.approx(0.95)
    assert share_confidence(2) == pytest.approx(0.975)
    verdict = conclude("Found.", effects_of([[1.0, 2.0], [1.0, 3.0]]), notes=["one diverged"])
    assert verdict == Verdict(INCONCLUSIVE, "Found.", verdict.effects, (), ("one diverged",), share_confidence(2), ())


def test_differences_are_of_seeds_that_both_have():
    assert difference({0: 1.0, 1: 2.0, 2: 4.0}, {1: 0.5, 2: 1.0, 3: 9.0}) == {1: 1.5, 2: 3.0}


def test_what_is_said_of_an_effect():
    said = say_effect(Effect("accuracy, batch less none", {0: 1.0, 1: 2.0, 2: 3.0}, 0.5, "points"), 0.95)
    assert said == "accuracy, batch less none: +2 points (-0.484 to +4.48, 3 seeds, 95 %), needs more than 0.5"
    assert say_effect(Effect("gain", {0: 1.0})) == "gain: +1, one seed, no interval"
    assert say_effect(Effect("gain", {})) == "gain: nothing measured"
    assert not math.isnan(find_interval([1.0, 1.0]).low)


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_compare_seldom_finds_a_difference_between_equal_norms(shared):
    """`shared` is the correlation of a run's validation and test score: with 1 the leader is the best on test, too."""
    false = {"worse": 0, "proven": 0}
    for repeat in range(400):
        generator = np.random.default_rng([repeat, round(shared)])

        records = {}

        def find(run, generator=generator, records=records):
            if run not in records:
                common, *own = generator.standard_normal(3)
                validation, test = (0.9 + 0.01 * (shared**0.5 * common + (1 - shared) ** 0.5 * part) for part in own)
                record = {"validation_score": validation, "validation_loss": 1.0, "test_score": test, "test_loss": 1.0}
                records[run] = {**vars(run), "status": "finished", **record}
            return records[run]

        norms = ("none", "batch", "layer", "instance", "group", "rms")
        choice = choose(Findings(Plan(("mlp",), norms, ("8",), (0.1,), 5, 64), find, (3500, 500, 1000)), "mlp", "8")
        false["worse"] += bool(choice.with_verdict("higher"))
        false["proven"] += bool(choice.proven)
    assert false["worse"] / 400 <= 0.05 + 2 * 0.011
    assert false["proven"] / 400 <= 0.05 + 2 * 0.011
