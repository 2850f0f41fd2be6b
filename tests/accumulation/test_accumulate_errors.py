"""`anynorm.accumulate`: what it refuses, and that nothing has changed then."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import anynorm
from accumulate_tasks import (
    MODES,
    SIZES,
    accumulate_and_compare,
    assert_near,
    cut,
    draw,
    find_loss,
    make_chain,
)


def take_other_way(model, batch):
    return (model[1:] if len(batch[0]) == 1 else model)(batch[0]).mean()


def fail_at_last(model, batch):
    if len(batch[0]) == 3 and torch.is_grad_enabled():
        raise KeyError("the user's own")
    return find_loss(model, batch)


def in_checkpoint(model, batch):
    return checkpoint(model, batch[0], use_reentrant=False).mean()


def penalize(model, batch):
    x = batch[0].requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return gradient.square().mean()


def penalize_always(model, batch):
    with torch.enable_grad():
        return penalize(model, batch)


def penalize_where_possible(model, batch):
    return penalize(model, batch) if torch.is_grad_enabled() else model(batch[0]).mean()


def step_inside(model, batch):
    model(batch[0]).mean().backward()
    return model(batch[0]).mean()


def give_residual(model, batch):
    y = model(batch[0], residual=batch[1])
    return y.sum(), y


def change_activation(model, batch):
    model.activation = "silu" if len(batch[0]) == 1 else "relu"
    return model(batch[0]).mean()


def train_later(model, batch):
    return model.train()(batch[0]).mean()


OUTSIDE = anynorm.BatchNorm2d(3).double()
GHOSTS_OUTSIDE = anynorm.GhostBatchNorm2d(3, ghost_size=2).double()
INNER = (
    "accumulate: loss must not differentiate, since a gradient through a batch norm needs every micro-batch; got "
    "torch.autograd.grad or backward() inside it; take a step of its own for a gradient penalty, or norms that need "
    "no batch"
)
UNLIKE = (
    "accumulate: mode 'lockstep' calls a batch norm once for all micro-batches, so that all must have a residual or "
    "none, and one activation; got another {} for the model in micro-batch 1 than in the first; take mode='sweep'"
)
ELSEWHERE = (
    "accumulate: loss must call no batch norm in training that is not in model; got {}; pass "
    "torch.nn.ModuleList([model, other]), whose gradients and buffers are then kept, too"
)
ORDER = "accumulate: all micro-batches must call the same batch norms in the same order; got "
BRANCHED = nn.Sequential(anynorm.BatchNorm2d(3), anynorm.BatchNorm2d(3)).double()
TEXTS = {
    "accumulate: mode must be one of sweep, lockstep, estimate; got 'exact'; the default is sweep":
        (ValueError, "exact", find_loss, {}),
    ORDER + "1 at call 0, where the first micro-batch has 0; look for a branch that depends on the data":
        (RuntimeError, MODES, take_other_way, {"model": BRANCHED}),
    "accumulate: weights must have one entry for each micro-batch; got 1, micro-batches 4; leave them out for "
    "shares of "
    "samples":
        (ValueError, MODES, find_loss, {"weights": [1.0]}),
    "accumulate: loss must return a scalar tensor, or a pair of it and outputs; got (4, 4); take the mean over the "
    "micro-batch":
        (RuntimeError, MODES, lambda model, batch: model(batch[0]), {}),
    "accumulate: 1 cannot take part; got BatchNorm2d; its statistics are out of reach; call anynorm.accelerate(model) "
    "first":
        (ValueError, MODES, find_loss, {"model": nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))}),
    "accumulate: norm_ih_l0 cannot take part; got SequenceRows; batch norm inside a recurrence takes its "
    "statistics step by "
    "step; choose norm='layer'":
        (ValueError, MODES, find_loss, {"model": "recurrent"}),
    "accumulate: the model cannot take part; got AnyNorm; its statistics are its own; use "
    "anynorm.BatchNorm1d/2d/3d where "
    "the pattern is theirs":
        (ValueError, MODES, find_loss, {"model": anynorm.AnyNorm("n c s -> c")}),
    "accumulate: the model cannot take part; got GhostBatchNorm2d; it pools or corrects in its own way; accumulate "
    "anynorm.BatchNorm1d/2d/3d, or call it batch by batch":
        (ValueError, MODES, find_loss, {"model": anynorm.GhostBatchNorm2d(3, ghost_size=2)}),
    "accumulate: the model cannot take part; got BatchRenormAct1d; it pools or corrects in its own way; accumulate "
    "anynorm.BatchNorm1d/2d/3d, or call it batch by batch":
        (ValueError, MODES, find_loss, {"model": anynorm.BatchRenormAct1d(3)}),
    "accumulate: the model cannot take part; got LazyBatchNorm2d; it has not seen an input; run one batch first":
        (ValueError, MODES, find_loss, {"model": anynorm.LazyBatchNorm2d()}),
    f"{anynorm.BatchNorm1d(3)}: statistics need "  # torch's words, which name `bias` in some versions only
    "more than 1 value "
    "per channel in all micro-batches together, or every output is beta; got 1; use a larger batch, drop a last "
    "batch of "
    "one with DataLoader(drop_last=True), call eval(), or build the norm with on_single='running' and take "
    "mode='lockstep'":
        (ValueError, ("sweep", "estimate"), lambda model, x: model(x).sum(),
         {"model": anynorm.BatchNorm1d(3), "batches": [torch.ones(1, 3), torch.ones(0, 3)]}),
    "accumulate: one or more micro-batches are needed; got none; skip the step":
        (ValueError, MODES, find_loss, {"batches": []}),
    "accumulate: a micro-batch's number of samples is the first axis of its first tensor; got str without one; pass "
    "weights=":
        (ValueError, MODES, find_loss, {"batches": ["a", "b"]}),
    "accumulate: mode 'lockstep' cannot compute a batch norm again in backward; got activation checkpointing; "
    "leave batch "
    "norms out of checkpoints, or take mode='sweep'":
        (RuntimeError, "lockstep", in_checkpoint, {}),
    INNER: (RuntimeError, MODES, penalize, {}),
    INNER + " ": (RuntimeError, MODES, penalize_always, {}),
    INNER + "  ": (RuntimeError, MODES, penalize_where_possible, {}),
    INNER + "   ": (RuntimeError, MODES, step_inside, {}),
    UNLIKE.format("residual"):
        (RuntimeError, "lockstep", give_residual,
         {"model": anynorm.BatchNormAct2d(3), "batches": [(torch.ones(2, 3, 1, 1), None), torch.ones(2, 1, 3, 1, 1)]}),
    UNLIKE.format("activation"):
        (RuntimeError, "lockstep", change_activation, {"model": anynorm.BatchNormAct2d(3).double()}),
    ELSEWHERE.format(f"BatchNorm2d({OUTSIDE.extra_repr()})"):
        (ValueError, MODES, lambda model, batch: OUTSIDE(batch[0]).mean(), {}),
    ELSEWHERE.format(f"GhostBatchNorm2d({GHOSTS_OUTSIDE.extra_repr()})"):
        (ValueError, MODES, lambda model, batch: GHOSTS_OUTSIDE(batch[0]).mean(), {}),
    "accumulate: the model cannot take part; got GhostBatchNorm2d; it pools or corrects in its own way; accumulate "
    "anynorm.BatchNorm1d/2d/3d, or call it batch by batch ":
        (ValueError, MODES, train_later, {"model": anynorm.GhostBatchNorm2d(3, ghost_size=2).double().eval()}),
    "'the user's own'":
        (KeyError, MODES, fail_at_last, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "mode"),
    [(text, mode) for text, row in TEXTS.items() for mode in ([row[1]] if isinstance(row[1], str) else row[1])],
)
def test_errors_say_what_and_change_nothing(text, mode):
    kind, _, loss, how = TEXTS[text]
    how = dict(how)
    model = how.pop("model", None)
    if model is None:
        model = make_chain(2)
    if model == "recurrent":
        model = anynorm.LSTM(3, 4, norm="batch-sequence")
    batches = how.pop("batches", cut(draw(13), SIZES))
    lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters())
    model = model if lazy else copy.deepcopy(model)  # torch cannot copy it
    before = {} if lazy else {name: t.clone() for name, t in model.state_dict().items()}
    gradients = {}
    for name, p in () if lazy else model.named_parameters():
        p.grad = gradients[name] = torch.ones_like(p)
    state = torch.get_rng_state()
    with pytest.raises(kind) as caught:
        anynorm.accumulate(model, batches, loss, mode=mode, **how)
    assert str(caught.value).replace('"', "'") == text.rstrip()  # blanks tell apart what raises the same
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in before.items():
        assert torch.equal(model.state_dict()[name], t), name
    for name, p in () if lazy else model.named_parameters():
        assert p.grad is gradients[name]
        assert (p.grad == 1).all()
    assert anynorm.sources.OVERRIDE.get() is None


@pytest.mark.parametrize("on_nonfinite", ["skip", "error"])
def test_batches_that_are_not_finite_change_nothing(on_nonfinite):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), anynorm.BatchNorm2d(2, on_nonfinite=on_nonfinite), nn.Flatten())
    x = torch.randn(4, 3, 2, 2)
    x[3] = torch.inf

    def step():
        anynorm.accumulate(model, x.split(2), lambda model, x: model(x).mean())

    if on_nonfinite == "error":
        with pytest.raises(FloatingPointError, match="NaN or Inf"):
            step()
        assert model[0].weight.grad is None
    else:
        with pytest.warns(UserWarning, match="was not counted"):
            step()
        assert model[1].nonfinite_batches == 1
    assert model[1].num_batches_tracked == 0
    assert (model[1].running_var == 1).all()


def test_gradients_turned_off_are_refused():
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"got torch\.no_grad\(\); call it outside"):
        anynorm.accumulate(make_chain(1), cut(draw(4), [2, 2]), find_loss)


@pytest.mark.parametrize("on_single", ["running", "skip"])
def test_on_single_is_obeyed_by_lockstep(on_single):
    """Equals the large batch, here of one value per channel; what sweep and estimate refuse."""
    model = nn.Sequential(nn.Linear(3, 3), anynorm.BatchNorm1d(3, on_single=on_single)).double()
    batch = torch.randn(1, 3).double(), torch.zeros(1, dtype=torch.long)
    accumulate_and_compare(model, [1, 0], batch, mode="lockstep")
    for mode in ("sweep", "estimate"):
        with pytest.raises(ValueError, match="on_single='running' and take mode='lockstep'"):
            anynorm.accumulate(model, cut(batch, [1, 0]), find_loss, mode=mode)


def test_other_residuals_are_served_by_sweep():
    """Equals the large batch, where 0 stands for none."""
    norm = anynorm.BatchNormAct2d(3).double()
    x, more = draw(8)[0], torch.cat([torch.zeros(4, 3, 5, 5), torch.ones(4, 3, 5, 5)]).double()
    found = anynorm.accumulate(norm, [(x[:4], None), (x[4:], more[4:])], give_residual)
    assert_near(torch.cat(found.outputs), copy.deepcopy(norm)(x, more), 1e-9)
