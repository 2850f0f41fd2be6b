"""The ward: every disease is found at its layer, what only looks like it is not, and repairs mend it."""

import copy

import pytest
import torch
import torch.distributed as dist

import anynorm
from anynorm.doctor.check import find_checks
from doctor.patients import find_loss
from doctor.state import State
from doctor.ward import CASES

pytestmark = pytest.mark.usefixtures("one_thread", "no_process_group")
REPAIRED = {check: case for check, case in CASES.items() if not case.no_repair}
LOOKALIKES = [(case, name) for case in CASES.values() for name in case.lookalikes]


@pytest.fixture
def no_process_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def find(patient, case):
    """What the case's check finds."""
    return patient.diagnose(case.check).findings


def find_outputs(patient):
    model = copy.deepcopy(getattr(patient.model, "module", patient.model)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return model(next(iter(list(patient.loader)))[0])


def test_every_check_has_a_case():
    assert set(CASES) == set(find_checks())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_sick_layer_is_named_and_nothing_changes(case):
    patient = case.sick(0)
    before = State(patient.model, patient.optimizer)
    found = find(patient, case)
    before.check()
    assert [finding.layer for finding in found] == [case.layer]
    assert found[0].evidence
    assert (found[0].repair is None) == bool(case.no_repair), case.no_repair
    everything = patient.diagnose()
    before.check()
    assert (case.check, case.layer) in {(finding.check, finding.layer) for finding in everything.findings}
    assert not everything.skipped or patient.optimizer is None


@pytest.mark.parametrize(("case", "name"), LOOKALIKES, ids=[f"{case.check}: {name}" for case, name in LOOKALIKES])
def test_what_only_looks_like_it_is_not_found(case, name):
    assert find(case.lookalikes[name](0), case) == []


@pytest.mark.parametrize("case", REPAIRED.values(), ids=REPAIRED)
def test_a_repair_removes_what_was_found_and_its_harm(case):
    patient = case.sick(0)
    harm = case.harm or find_loss
    before, outputs = harm(patient), find_outputs(patient)
    (finding,) = find(patient, case)
    finding.apply()
    assert find(patient, case) == []
    assert harm(patient) < before
    if finding.repair.is_exact:
        assert (find_outputs(patient) - outputs).abs().max() <= 1e-4 * outputs.abs().max()


@pytest.mark.parametrize("case", REPAIRED.values(), ids=REPAIRED)
def test_the_code_to_paste_does_the_same(case):
    (finding,) = find(case.sick(0), case)
    assert "\n\n" not in finding.repair.code
    patient = case.sick(0)
    harm = case.harm or find_loss
    before = harm(patient)
    names = {"model": patient.model, "loader": patient.loader, "optimizer": patient.optimizer}
    names |= {"loss_fn": patient.loss_fn, "anynorm": anynorm, "torch": torch, "copy": copy, **case.names}
    exec(finding.repair.code, names)
    patient.model, patient.loader, patient.optimizer = names["model"], names["loader"], names["optimizer"]
    assert find(patient, case) == []
    assert harm(patient) < before


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.no_repair], ids=lambda case: case.check)
def test_what_cannot_be_repaired_says_so(case):
    (finding,) = find(case.sick(0), case)
    with pytest.raises(anynorm.UserError, match="must have a repair"):
        finding.apply()
    assert finding.advice
