import numpy as np
import pytest
from matplotlib.figure import Figure

from anynorm.apps.studies.claims.ioffe2015 import ARMS, LOOKS, STUDY, find_movement, paint, perform, plan
from anynorm.apps.studies.study import Results, Trial


def invent(gain, steadier):
    """Records in which batch norm gains so many points, and moves 2 ** steadier times less."""

    def find(trial):
        generator = np.random.default_rng([trial.seed, len(trial.arm)])
        is_batch, noise = trial.arm == "batch", 0.1 * generator.standard_normal(2)
        curve = {"step": [*range(LOOKS)], "accuracy": [50.0] * LOOKS, "15": [0.0] * LOOKS, "50": [1.0] * LOOKS}
        curve["85"] = [2.0] * LOOKS
        accuracy = 80 + gain * is_batch + noise[0]
        movement = -steadier * is_batch + noise[1]
        return {"status": "finished", "accuracy": accuracy, "last": accuracy, "log_movement": movement, "curve": curve}

    return find


@pytest.mark.parametrize(
    ("gain", "steadier", "outcome"),
    [(5, 2, "confirmed"), (-5, 2, "refuted"), (5, -2, "refuted"), (1, 2, "inconclusive")],
)
def test_the_verdict_follows_the_numbers(make, gain, steadier, outcome):
    setting = make(4)
    find = invent(gain, steadier)
    results = Results(setting, list(plan(setting, find)), find)
    assert STUDY.judge(results).outcome == outcome
    paint(results, Figure().add_subplot())


def test_movement_is_in_units_of_the_spread():
    curve = {"15": [0.0, 1.0, 2.0], "50": [1.0, 2.0, 3.0], "85": [4.0, 5.0, 6.0]}
    scaled = {name: [10 * value for value in values] for name, values in curve.items()}
    assert find_movement(curve) == pytest.approx(np.log2(1 / 4))
    assert find_movement(scaled) == pytest.approx(find_movement(curve))


def test_both_arms_start_from_the_same_weights_and_are_looked_at_evenly(make):
    setting = make(1)
    found = {arm: perform(Trial.of(arm, 0.05, 0, steps=60), setting) for arm in ARMS}
    for record in found.values():
        assert record["status"] == "finished"
        assert record["curve"]["step"] == [2 * look for look in range(1, LOOKS + 1)]
    spreads = [record["curve"]["85"][0] - record["curve"]["15"][0] for record in found.values()]
    assert 1.5 < spreads[1] < 2.5, "normalized: from the 15th to the 85th percentile of about a normal distribution"
    assert spreads[0] != pytest.approx(spreads[1], rel=0.1)
    assert found["batch"] == perform(Trial.of("batch", 0.05, 0, steps=60), setting)
