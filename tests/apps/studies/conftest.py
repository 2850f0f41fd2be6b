"""A study with invented numbers, so that judging and reporting are tested without training."""

import numpy as np
import pytest

from anynorm.apps.studies.compare.findings import Findings
from anynorm.apps.studies.compare.judge import choose_all
from anynorm.apps.studies.compare.plan import Plan
from anynorm.apps.studies.compare.train import Run

MEANS = {"none": 0.80, "batch": 0.90, "layer": 0.89, "instance": 0.86, "group": 0.88, "rms": 0.885}


def invent(run: Run) -> dict:
    """A record as train() gives it; batch norm fails at batch 2, and instance norm diverges at the largest rate."""
    generator = np.random.default_rng([run.seed, len(run.norm), len(run.batch)])
    accuracy = MEANS[run.norm] + 0.005 * generator.standard_normal()
    if run.norm == "batch" and run.batch == "2":
        accuracy -= 0.4
    accuracy -= 0.05 * abs(np.log10(run.rate / 0.1))
    record = {**vars(run), "status": "finished", "steps": 8, "seen": run.images, "seconds": 0.5}
    record |= {"validation_score": accuracy, "validation_loss": 1 - accuracy}
    if run.norm == "instance" and run.rate >= 1:
        record["status"] = "diverged"
    if run.final:
        record |= {"test_score": accuracy - 0.01, "test_loss": 1 - accuracy, "probed_layer": "9"}
        record["modes"] = {
            "training_score": accuracy - 0.05,
            "training_loss": 0.6,
            "evaluation_score": accuracy,
            "evaluation_loss": 0.5,
        }
        points = np.arange(9)
        record["curve"] = {
            "step": points.tolist(),
            "images": (points * 10).tolist(),
            "seconds": (points * 0.1).tolist(),
            "loss": [None, *np.exp(-points[1:] / 4).tolist()],
            "score": (accuracy * points / 8).tolist(),
            "probe_mean": (points * 0.1).tolist(),
            "probe_std": (1 + points * 0.1).tolist(),
        }
    return record


@pytest.fixture(scope="session")
def make_findings():
    """Findings of an invented study with the given models, seeds and finished runs."""

    def make(models=("cnn", "mlp"), *, seeds=3, batches=("64", "2"), finished=lambda run: True, rates=(0.01, 0.1, 1.0)):
        impossible = {(model, batch, "instance"): "no room" for model in models[1:] for batch in batches}
        plan = Plan(tuple(models), tuple(MEANS), tuple(batches), tuple(rates), seeds, 2048, impossible)
        records = {}

        def find(run):
            if not finished(run):
                return None
            return records.setdefault(run, invent(run))

        findings = Findings(plan, find, (3500, 500, 1000))
        return findings, choose_all(findings)

    return make


@pytest.fixture(scope="session")
def make_results():
    """The content of results.json for invented findings."""
    from anynorm.apps.studies.compare.effects import say_effects
    from anynorm.apps.studies.compare.verdict import say_unjudged, say_verdict

    def make(findings, choices, data="mnist"):
        return {
            "verdict": say_verdict(findings, choices),
            "not_judged": say_unjudged(findings, choices),
            "effects": say_effects(findings),
            "options": {"data": data},
            "finished_runs": 10,
            "planned_runs": 12,
            "data_sizes": [3500, 500, 1000],
            "sample_shape": [1, 28, 28],
            "classes": 10,
            "metric": vars(findings.metric),
            "learned": {"loss": "cross-entropy", "optimizer": "plain SGD", "kind": "classes", "targets": "10 classes"},
            "start": [],
            "about": {model: f"the network {model}" for model in findings.plan.models},
            "versions": {"anynorm": "0", "torch": "0", "numpy": "0", "python": "0"},
            "machine": {"system": "here", "cores": 2, "torch_threads_per_run": 1},
        }

    return make
