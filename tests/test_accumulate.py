"""`anynorm.accumulate`: micro-batches equal the one large batch, whose norms torch's autograd differentiates."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import anynorm
from accumulate_tasks import cut, draw, find_loss, find_state, make_blocks, make_chain, on_ranks
from gloo import Processes

EXACT = ("sweep", "lockstep")
MODES = (*EXACT, "estimate")
SIZES = [4, 1, 5, 3]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # times the largest gradient of the model, or value of a buffer


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """One thread, because for layers this small others only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def accumulate_and_compare(model, sizes, batch, loss=find_loss, mode="sweep", tolerance=1e-9):
    """Equals the large batch: loss, outputs, every gradient and every buffer."""
    large = copy.deepcopy(model)
    found, outputs = loss(large, batch)
    found.backward()
    result = anynorm.accumulate(model, cut(batch, sizes), loss, mode=mode)
    assert_near(result.loss, found, tolerance)
    assert_near(torch.cat(result.outputs), outputs, tolerance)
    assert_same_state(find_state(model), find_state(large), tolerance)
    return result


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, scale: float | None = None) -> None:
    scale = float(wanted.detach().abs().max()) if scale is None else scale
    error = float((got.detach() - wanted.detach()).abs().max())
    assert error <= tolerance * scale, f"{error:.3g}, allowed {tolerance * scale:.3g}"


def assert_same_state(got: dict, wanted: dict, tolerance: float) -> None:
    assert list(got) == list(wanted)
    largest = max(float(t.abs().max()) for name, t in wanted.items() if name.startswith("grad"))
    for name, t in wanted.items():
        if "num_batches" in name:
            assert got[name] == t
        else:
            assert_near(got[name], t, tolerance, largest if name.startswith("grad") else None)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["BatchNorm2d", "BatchNormAct2d"])
@pytest.mark.parametrize("norms", [1, 3, 20])
def test_equals_the_large_batch(norms, kind, dtype, mode):
    model = make_chain(norms, kind, dtype)
    result = accumulate_and_compare(model, SIZES, draw(13, dtype), mode=mode, tolerance=TOLERANCE[dtype])
    assert result.calls == (norms if mode == "sweep" else None)


@pytest.mark.parametrize("mode", EXACT)
def test_equals_the_large_batch_with_reused_norms_and_branches(mode):
    accumulate_and_compare(make_blocks(), SIZES, draw(13), mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_equals_torch(mode):
    """Of the three kinds: equals torch, on torch's own norms."""
    model = make_chain(3)
    theirs = nn.Sequential(
        *(nn.BatchNorm2d(6) if isinstance(m, anynorm.BatchNorm2d) else copy.deepcopy(m) for m in model)
    )
    theirs = theirs.double()
    theirs.load_state_dict(model.state_dict())
    found, _ = find_loss(theirs, draw(13))
    found.backward()
    anynorm.accumulate(model, cut(draw(13), SIZES), find_loss, mode=mode)
    assert_same_state(find_state(model), find_state(theirs), 1e-9)


class Sequences(nn.Module):
    """(N, 4, L) with lengths, two masked norms, one of them fused with a residual and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(4, 4, 1) for _ in range(2))
        self.norm, self.act = anynorm.BatchNorm1d(4), anynorm.BatchNormAct1d(4, activation="silu")

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.norm(self.first(x), lengths=lengths)
        return self.act(self.second(x), residual=x, lengths=lengths)


def find_sequence_loss(model, batch):
    y = model(*batch)
    return y.square().sum() / len(y), y


@pytest.mark.parametrize("mode", EXACT)
def test_lengths_equal_the_large_batch(mode):
    """A micro-batch of nothing but padding among them."""
    batch = torch.randn(7, 4, 6).double(), torch.tensor([6, 2, 0, 0, 5, 1, 3])
    accumulate_and_compare(Sequences().double(), [2, 2, 3], batch, find_sequence_loss, mode)


@pytest.mark.parametrize("mode", EXACT)
def test_masked_context_equals_the_large_batch(mode):
    mask = anynorm.mask_of([6, 2, 5, 1, 3], 6)

    def loss(model, batch):
        with anynorm.masked(batch[1]):
            y = model(batch[0])
        return y.square().sum() / len(y), y

    model = nn.Sequential(anynorm.BatchNorm1d(4), nn.Conv1d(4, 4, 1), anynorm.BatchNorm1d(4)).double()
    accumulate_and_compare(model, [2, 3], (torch.randn(5, 4, 6).double(), mask), loss, mode)


@pytest.mark.parametrize("mode", EXACT)
def test_single_samples_equal_the_large_batch(mode):
    """One value per channel in each micro-batch, which alone would be refused."""
    model = nn.Sequential(nn.Linear(3, 4), anynorm.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)).double()
    batch = torch.randn(5, 3).double(), torch.randint(4, (5,))
    accumulate_and_compare(model, [1] * 5, batch, mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_empty_micro_batch_changes_nothing(mode):
    accumulate_and_compare(make_chain(2), [4, 0, 3], draw(7), mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_images_of_different_sizes_equal_one_norm_over_all_positions(mode):
    """What no large batch can hold: the reference is each layer on all images' positions as rows."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), anynorm.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double()
    images = [torch.randn(2, 3, 4, 4).double(), torch.randn(1, 3, 2, 5).double()]
    rows = torch.cat([x.movedim(1, -1).reshape(-1, 3) for x in images])[:, :, None, None]
    large = copy.deepcopy(model)
    large(rows).square().sum().backward()
    anynorm.accumulate(model, images, lambda model, x: model(x).square().sum(), mode=mode, weights=[1, 1])
    for name, wanted in find_state(large).items():
        assert_near(find_state(model)[name], wanted, 1e-9, 1.0)


@pytest.mark.parametrize("mode", EXACT)
def test_packed_sequences_equal_the_large_batch(mode):
    model = nn.ModuleList([anynorm.BatchNorm1d(4), anynorm.BatchNorm1d(4)]).double()
    rows = [torch.randn(n, 4).double() for n in (5, 3, 2, 1)]

    def loss(model, sequences):
        y = model[1](model[0](nn.utils.rnn.pack_sequence(sequences)))
        return y.data.pow(3).sum()

    large = copy.deepcopy(model)
    loss(large, rows).backward()
    anynorm.accumulate(model, [rows[:2], rows[2:]], loss, mode=mode, weights=[1, 1])
    for name, wanted in find_state(large).items():
        assert_near(find_state(model)[name], wanted, 1e-9, 1.0)


class Dropped(nn.Module):
    """Dropout between two norms, of what a seed of each sample says, so that the large batch drops the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([anynorm.BatchNorm2d(3), anynorm.BatchNorm2d(4)])
        self.middle, self.last = nn.Conv2d(3, 4, 3), nn.Linear(36, 4)

    def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
        keep = [torch.rand(x[0].shape, generator=torch.Generator().manual_seed(int(seed))) > 0.5 for seed in seeds]
        x = self.norms[0](x) * torch.stack(keep) * 2
        return self.last(self.norms[1](self.middle(x)).relu().flatten(1))


@pytest.mark.parametrize("mode", EXACT)
def test_dropout_equals_the_large_batch(mode):
    def loss(model, batch):
        y = model(batch[0], batch[2])
        return F.cross_entropy(y, batch[1]), y

    accumulate_and_compare(Dropped().double(), SIZES, (*draw(13), torch.arange(13)), loss, mode)


@pytest.mark.parametrize("mode", ["sweep", "estimate"])
def test_random_numbers_are_those_of_plain_accumulation(mode):
    """Keeps an invariant: every run of a micro-batch draws what plain accumulation draws, from every generator."""
    drawn: list[tuple] = []

    def loss(model, batch):
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002 # the global one
        return find_loss(model, batch)

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002

    model = nn.Sequential(*make_chain(2)[:-1], nn.Dropout(0.5), nn.Linear(150, 4)).double()
    seed()
    for batch in cut(draw(13), SIZES):
        loss(copy.deepcopy(model), batch)
    plain, after = list(drawn), torch.get_rng_state()
    drawn.clear()
    seed()
    anynorm.accumulate(model, cut(draw(13), SIZES), loss, mode=mode)
    assert drawn[: len(SIZES)] == plain
    assert set(drawn) == set(plain)
    assert torch.equal(torch.get_rng_state(), after)


def test_sweep_with_dropout_is_lockstep_with_the_same_draws():
    """Dropout behind the last norm, where lockstep draws in the order of micro-batches, too."""
    model = nn.Sequential(*make_chain(2)[:-1], nn.Dropout(0.5), nn.Linear(150, 4)).double()
    states = []
    for mode in EXACT:
        torch.manual_seed(5)
        twin = copy.deepcopy(model)
        anynorm.accumulate(twin, cut(draw(13), SIZES), find_loss, mode=mode)
        states.append(find_state(twin))
    assert_same_state(states[0], states[1], 1e-9)


def find_errors(model, batch, sizes) -> tuple[dict[str, float], dict[str, float]]:
    """Of outputs and of gradients, against the large batch, of plain accumulation and of the estimate."""
    large, plain, cheap = (copy.deepcopy(model) for _ in range(3))
    found, wanted = find_loss(large, batch)
    found.backward()
    outputs = []
    for share, size in zip(cut(batch, sizes), sizes):
        loss, y = find_loss(plain, share)
        (loss * size / sum(sizes)).backward()
        outputs.append(y)
    result = anynorm.accumulate(cheap, cut(batch, sizes), find_loss, mode="estimate")
    errors = {}, {}
    for name, twin, y in (("plain", plain, outputs), ("estimate", cheap, result.outputs)):
        gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (twin, large)]
        errors[0][name] = float((torch.cat(y) - wanted).norm().detach())
        errors[1][name] = float((gradients[0] - gradients[1]).norm())
    return errors


@pytest.mark.parametrize("norms", [1, 3, 9])
def test_estimate_is_nearer_than_plain_accumulation(norms):
    """Keeps an invariant: smaller errors of outputs and of gradients; outputs of one norm are exact."""
    outputs, gradients = find_errors(make_chain(norms), draw(32), [8] * 4)
    assert outputs["estimate"] < (1e-9 if norms == 1 else 0.7 * outputs["plain"])
    assert gradients["estimate"] < 0.9 * gradients["plain"]


def test_estimate_of_one_micro_batch_is_exact():
    accumulate_and_compare(make_blocks(), [13], draw(13), mode="estimate")


def test_estimate_is_the_same_by_kernels_and_by_the_formula(monkeypatch):
    states = []
    for off in (False, True):
        monkeypatch.setattr(
            anynorm.engine.merged, "is_plain", anynorm.engine.watch.is_plain if not off else lambda *_: False
        )
        model = make_blocks()
        anynorm.accumulate(model, cut(draw(13), SIZES), find_loss, mode="estimate")
        states.append(find_state(model))
    assert_same_state(states[1], states[0], 1e-9)


def test_parts_by_kernels_and_by_the_formula_go_together(monkeypatch):
    """Sums mean the same on both paths."""
    monkeypatch.setattr(anynorm.engine.merged, "is_plain", lambda x, *_: len(x) > 3)
    accumulate_and_compare(make_blocks(), SIZES, draw(13))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_added_in_place(mode):
    model, twin = make_chain(2), make_chain(2)
    anynorm.accumulate(twin, cut(draw(13), SIZES), find_loss, mode=mode)
    before = {}
    for name, p in model.named_parameters():
        p.grad = before[name] = torch.ones_like(p)
    anynorm.accumulate(model, cut(draw(13), SIZES), find_loss, mode=mode)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert p.grad is before[name]
        torch.testing.assert_close(p.grad, q.grad + 1)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_options_equal_the_large_batch(options, mode):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), anynorm.BatchNorm2d(6, **options), nn.Flatten(), nn.Linear(150, 4)
    )
    accumulate_and_compare(model.double(), SIZES, draw(13), mode=mode)


@pytest.mark.parametrize("mode", EXACT)
def test_frozen_norms_and_frozen_layers_equal_the_large_batch(mode):
    """A norm in evaluation takes no part; below a frozen layer no input wants a gradient."""
    model = make_chain(3)
    model[1].eval()
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    large = copy.deepcopy(model)
    find_loss(large, draw(13))[0].backward()
    anynorm.accumulate(model, cut(draw(13), SIZES), find_loss, mode=mode)
    for name, wanted in find_state(large).items():
        assert_near(find_state(model)[name], wanted, 1e-9, 1.0)


def test_other_buffers_move_once():
    """Equals the large batch: instance norm's averages, and spectral norm's vectors, which move at every forward."""
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1))
    model = nn.Sequential(
        spectral, anynorm.InstanceNorm2d(4, track_running_stats=True), anynorm.BatchNorm2d(4), nn.Flatten()
    )
    large = copy.deepcopy(model.double())
    large(draw(13)[0]).square().mean().backward()
    anynorm.accumulate(
        model, [(x,) for x in draw(13)[0].split(SIZES)], lambda model, batch: model(*batch).square().mean()
    )
    for name, wanted in find_state(large).items():
        assert_near(find_state(model)[name].double(), wanted.double(), 1e-9, 1.0)


def test_update_once_counts_one_batch():
    model = make_chain(2)
    with anynorm.update_once():
        for _ in range(2):
            anynorm.accumulate(model, cut(draw(13), SIZES), find_loss)
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("mode", ["sweep", "estimate"])
def test_checkpoints_equal_plain_forwards(mode):
    """Activation checkpointing computes norms again in backward, with what is known of them."""
    model, twin = make_chain(3), make_chain(3)

    def loss(model, batch):
        y = checkpoint(model[:6], batch[0], use_reentrant=False)
        return F.cross_entropy(model[6:](y), batch[1])

    anynorm.accumulate(model, cut(draw(13), SIZES), loss, mode=mode)
    anynorm.accumulate(twin, cut(draw(13), SIZES), find_loss, mode=mode)
    assert_same_state(find_state(model), find_state(twin), 1e-9)


def test_autocast_reaches_the_threads():
    seen = []

    def loss(model, x):
        seen.append(model[0](x).dtype)
        return model(x).float().square().mean()

    model = nn.Sequential(nn.Conv2d(3, 4, 1), anynorm.BatchNorm2d(4))
    with torch.autocast("cpu", torch.bfloat16):
        anynorm.accumulate(model, torch.randn(4, 3, 5, 5).split(2), loss, mode="lockstep")
    assert seen == [torch.bfloat16] * 2


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
    "BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True): statistics need "
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


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("way", ["model", "in place", "forward", "part", "loss", "step"])
def test_compiled_code_equals_the_large_batch(way, mode):
    """It runs without its compiler meanwhile, whatever was compiled."""
    inside, large = make_chain(2), make_chain(2)
    find_loss(large, draw(13))[0].backward()
    model, loss, step = inside, find_loss, anynorm.accumulate
    if way == "model":
        model = torch.compile(inside, backend="eager")
    if way == "in place":
        inside.compile(backend="eager")
    if way == "forward":
        inside.forward = torch.compile(inside.forward, backend="eager")
    if way == "part":
        inside[1].forward = torch.compile(inside[1].forward, backend="eager")
    if way == "loss":
        loss = torch.compile(find_loss, backend="eager")
    if way == "step":
        step = torch.compile(lambda *given, mode: anynorm.accumulate(*given, mode=mode), backend="eager")
    step(model, cut(draw(13), SIZES), loss, mode=mode)
    assert_same_state(find_state(inside), find_state(large), 1e-9)


class Moving(nn.Module):
    """Forward puts new tensors in the place of buffers: a float, a whole number, one that grows, a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([anynorm.BatchNorm2d(3), anynorm.BatchNorm2d(3)])
        self.register_buffer("share", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.share, self.steps = self.share * 0.5, self.steps + 1
        self.seen, self.last = torch.cat([self.seen, torch.ones(1)]), torch.ones(2)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(3))
        return self.norms[1](self.norms[0](x) * self.share)


@pytest.mark.parametrize("mode", ["sweep", "estimate"])
def test_replaced_buffers_move_once(mode):
    """Equals the large batch; whoever holds a buffer still does."""
    model, large = Moving(), Moving()
    large(draw(8)[0].float()).square().mean().backward()
    held = model.share
    anynorm.accumulate(model, draw(8)[0].float().split(2), lambda model, x: model(x).square().mean(), mode=mode)
    assert model.share is held
    assert list(model.state_dict()) == list(large.state_dict())
    for name in ("share", "steps", "seen", "last", "late"):
        assert torch.equal(getattr(model, name), getattr(large, name)), name


@pytest.mark.parametrize("mode", MODES)
def test_replaced_buffers_are_as_before_after_an_error(mode):
    def fail(model, x):
        model(x)
        raise KeyError("the user's own")

    model = Moving()
    before, held = copy.deepcopy(model.state_dict()), model.steps
    with pytest.raises(KeyError):
        anynorm.accumulate(model, draw(8)[0].float().split(2), fail, mode=mode)
    assert model.steps is held
    assert model.last is None
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("mode", EXACT)
def test_two_models_equal_the_large_batch(mode):
    """What a norm outside the model is told to do."""
    model = nn.ModuleList([nn.Conv2d(3, 6, 1), anynorm.BatchNorm2d(6)]).double()

    def loss(both, batch):
        y = both[1](both[0](batch[0]))
        return y.pow(3).mean(), y

    accumulate_and_compare(model, SIZES, draw(13), loss, mode)


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


@pytest.fixture(scope="module")
def ranks():
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("sizes", [[[3, 4], [2, 2]], [[4, 1, 3], [5]]], ids=str)
def test_ranks_equal_the_large_batch(ranks, sizes, mode):
    """Micro-batches of two ranks, uneven in size and number; gradients are summed over ranks."""
    large = make_blocks()
    batch = draw(sum(map(sum, sizes)))
    loss, outputs = find_loss(large, batch)
    loss.backward()
    found = ranks.run(on_ranks, mode, sizes)
    assert_near(sum(one["loss"] for one in found), loss, 1e-9)
    assert_near(torch.cat([one["outputs"] for one in found]), outputs, 1e-9)
    for one in found:
        for name, wanted in find_state(large).items():
            got = sum(other["state"][name] for other in found) if name.startswith("grad") else one["state"][name]
            assert_near(got, wanted, 1e-9, 1.0)


def test_ranks_estimate_alike(ranks):
    """Keeps an invariant: running averages of both ranks have the same bits, and are near the large batch's."""
    sizes = [[3, 4], [2, 5, 2]]
    large = make_blocks()
    find_loss(large, draw(16))[0].backward()
    found = [one["state"] for one in ranks.run(on_ranks, "estimate", sizes)]
    for name, buffer in large.named_buffers():
        assert torch.equal(found[0][name], found[1][name])
        assert_near(found[0][name].double(), buffer.double(), 0.05)
