"""Domain batch norm: checkpoints, copies, and how one comes from a batch norm."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn

import anynorm
from modules.domain_cases import DOMAINS, SHAPES, make, train
from surgery.recalibration_cases import draw


@pytest.mark.parametrize("shared", [True, False])
def test_state_copies_and_pickles(shared):
    """Invariant: state_dict, deepcopy, pickle and torch.save keep every domain, and share nothing."""
    norm = make(shared_affine=shared)
    train(norm)
    loaded = make(shared_affine=shared)
    assert not any(loaded.load_state_dict(norm.state_dict()))
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    twins = (loaded, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), torch.load(file, weights_only=False))
    wanted = {name: t.clone() for name, t in norm.state_dict().items()}
    assert len(wanted) == (8 if shared else 10)
    train(norm)
    for twin in twins:
        assert twin.domains == DOMAINS
        assert twin.state_dict().keys() == wanted.keys()
        assert all(torch.equal(t, wanted[name]) for name, t in twin.state_dict().items())
        train(twin)
        assert all(map(torch.equal, twin.state_dict().values(), norm.state_dict().values()))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_an_ordinary_checkpoint_starts_every_domain_and_that_is_said(shared, assign):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with torch.no_grad():
        model[1].weight.copy_(draw(3))
    model(draw(*SHAPES[2]))
    into = nn.Sequential(nn.Conv2d(3, 3, 1), make(shared_affine=shared))
    with pytest.warns(
        UserWarning, match="ordinary batch norm was loaded; each of the domains day, night starts from it"
    ):
        assert not any(into.load_state_dict(model.state_dict(), assign=assign))
    for name in DOMAINS:
        with anynorm.domain(name):
            for key, value in model[1].state_dict().items():
                assert torch.equal(getattr(into[1], key), value)
    with anynorm.domain("night"):
        into[1](draw(*SHAPES[2], mean=3))
    assert torch.equal(into[1].running_mean_day, model[1].running_mean)
    assert not torch.equal(into[1].running_mean_night, model[1].running_mean)


def test_what_is_wrong_in_a_checkpoint_is_named_and_nothing_is_loaded():
    norm = make()
    before = {name: t.clone() for name, t in norm.state_dict().items()}
    train(norm)
    state = {name: t.clone() for name, t in norm.state_dict().items()}
    norm.load_state_dict(before)
    state["running_var_night"][0] = -1
    with pytest.raises(RuntimeError, match="running_var_night must not be negative; got -1"):
        norm.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "running_mean_night"'):
        make().load_state_dict({key: t for key, t in before.items() if key != "running_mean_night"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "running_mean_dusk"'):
        make().load_state_dict({**before, "running_mean_dusk": torch.zeros(3)})


def test_checkpoints_without_a_counter():
    """From torch before 0.4.1; the counters stay."""
    state = nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    norm = make()
    norm.num_batches_tracked_night.fill_(4)
    with pytest.warns(UserWarning, match="ordinary batch norm"):
        assert not any(norm.load_state_dict(state))
    assert int(norm.num_batches_tracked_night) == 4


def test_reset_is_of_every_domain():
    for shared in (True, False):
        norm, new = make(shared_affine=shared), make(shared_affine=shared)
        train(norm)
        norm.reset_parameters()
        assert all(map(torch.equal, norm.state_dict().values(), new.state_dict().values()))


def test_it_prints_its_domains():
    assert repr(make(shared_affine=False)).endswith("domains=('day', 'night'), shared_affine=False)")


# ---- from a batch norm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [nn, anynorm], ids=["torch", "ours"])
@pytest.mark.parametrize("shared", [True, False])
def test_from_a_batch_norm(room, shared):
    norm = room.BatchNorm2d(3, eps=0.1, momentum=None, dtype=torch.float64).eval()
    norm.weight.requires_grad_(False)
    norm.running_mean.fill_(2)
    norm.register_forward_hook(lambda *_: None)
    made = anynorm.DomainBatchNorm2d.from_batch_norm(norm, DOMAINS, shared_affine=shared)
    x = draw(*SHAPES[2], dtype=torch.float64)
    for name in DOMAINS:
        with anynorm.domain(name):
            torch.testing.assert_close(made(x), norm(x))
            assert (made.weight is norm.weight) is shared
            assert not made.weight.requires_grad
    assert len(made._forward_hooks) == 1 and not made.training
    made._forward_hooks.clear()
    made.running_mean_day.zero_()
    assert len(norm._forward_hooks) == 1 and bool((norm.running_mean == 2).all())
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: make(domains=()), "one or more different names .* got \\(\\)"),
        (lambda: make(domains="day"), "got 'day'; pass \\('day', 'night'\\)"),
        (lambda: make(domains=("day", "day")), "different names"),
        (lambda: make(domains=("a.b",)), "without a dot"),
        (lambda: make(track_running_stats=False), "differ in their running averages; got track_running_stats=False"),
        (
            lambda: anynorm.DomainBatchNorm2d.from_batch_norm(nn.BatchNorm1d(3), DOMAINS),
            "must be a BatchNorm2d .* got BatchNorm1d",
        ),
        (lambda: anynorm.DomainBatchNorm2d.from_batch_norm(anynorm.BatchNormAct2d(3), DOMAINS), "got BatchNormAct2d"),
    ],
)
def test_what_is_refused(build, text):
    with pytest.raises(anynorm.UserError, match=text):
        build()
