"""Healthy models: nothing is wrong with them, and nothing is found."""

import pytest

from doctor.healthy import MAKERS, make_healthy
from doctor.state import State

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MAKERS)
def test_a_healthy_model_has_no_findings(name):
    patient = make_healthy(name, seed=0, steps=60)
    before = State(patient.model, patient.optimizer)
    found = patient.diagnose(batches=8)
    before.check()
    assert not found.skipped
    assert "evaluation problem" not in found.measured
    assert [str(finding) for finding in found.findings] == []
