from types import SimpleNamespace

import pytest

from anynorm.apps.studies.compare.agenda import Comparison
from anynorm.apps.studies.compare.plan import Plan
from anynorm.apps.studies.compare.train import Run, find_steps
from anynorm.apps.studies.fit import draw_order
from anynorm.apps.studies.session import RunCosts

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@pytest.fixture
def plan():
    return Plan(("mlp",), ("none", "batch"), ("2", "64"), RATES, 2, 2048)


def record(run, accuracy, status="finished"):
    return {**vars(run), "status": status, "validation_score": accuracy, "validation_loss": 1.0}


def run_everything(plan, judge):
    done, order = {}, []
    while waiting := [run for run in plan.order(done.get) if run not in done]:
        done[waiting[0]] = judge(waiting[0])
        order.append(waiting[0])
    return done, order


def test_every_norm_gets_the_same_rates_and_images(plan):
    done, _ = run_everything(plan, lambda run: record(run, 0.5))
    spent = {}
    for run in done:
        spent.setdefault((run.norm, run.batch), []).append((run.rate, run.seed, run.images, run.final))
    for batch in ("2", "64"):
        assert sorted(spent["none", batch]) == sorted(spent["batch", batch])
    assert len(done) == plan.count()


def test_the_best_validation_accuracy_wins_and_diverged_rates_lose(plan):
    def judge(run):
        if run.rate == 0.3:
            return record(run, 0.99, "diverged")
        return record(run, 0.9 if run.rate == 0.03 else 0.2)

    done, _ = run_everything(plan, judge)
    assert {run.rate for run in done if run.final} == {0.03}


def test_no_cell_waits_for_the_end_of_another(plan):
    _, order = run_everything(plan, lambda run: record(run, 0.5))
    finals = [place for place, run in enumerate(order) if run.final and run.batch == "64"]
    first_look = [place for place, run in enumerate(order) if not run.final and run.batch == "2"]
    assert max(finals) < max(first_look), "large batches are judged before small ones have been searched"
    assert min(first_look) < min(finals), "small batches do not wait for it"
    norms = [run.norm for run in order]
    assert norms[: len(norms) // 2].count("none") == norms[: len(norms) // 2].count("batch")


def test_first_look(plan):
    assert plan.first_look_done(lambda run: record(run, 0.5))
    assert not plan.first_look_done(lambda run: None)


def test_a_single_rate_needs_no_search():
    plan = Plan(("mlp",), ("none",), ("8",), (0.1,), 2, 512)
    assert [(run.final, run.seed) for run in plan.order(lambda run: None)] == [(True, 0), (True, 1)]
    assert plan.count() == 2


def test_impossible_cells_are_not_run():
    plan = Plan(("mlp",), ("none", "instance"), ("8",), RATES, 1, 512, {("mlp", "8", "instance"): "one value"})
    assert {run.norm for run in plan.order(lambda run: None)} == {"none"}


def test_steps_and_order():
    assert find_steps("64:8", 256) == [64, 64] + [8] * 16
    assert find_steps("100", 250) == [100, 100]
    order = draw_order(10, 25, 3)
    assert sorted(order[:10]) == list(range(10))
    assert (order == draw_order(10, 25, 3)).all()
    assert (order[:10] == draw_order(10, 10, 3)).all()


def test_clock_expects_the_worst_it_has_seen_lately():
    agenda = Comparison(Plan(("mlp",), ("none",), ("8",), RATES, 1, 2048), SimpleNamespace(), {}, 0.0)
    costs, run = RunCosts(agenda), Run("mlp", "none", "8", 0.1, 0, 100, True)
    assert costs.estimate(run) == 0
    for wall in (9.0, 1.0, 2.0, 1.0, 1.0):
        costs.learn(run, wall)
    assert costs.estimate(run) == 2.0
