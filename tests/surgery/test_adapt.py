"""adapt: statistics of test batches against NumPy float64, and that a model is afterwards what it was."""

import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm import reference
from anynorm.surgery.adaptation.norms import BORROWED
from specimens import wide
from surgery.recalibration_cases import draw, make_net, photograph

quiet = pytest.mark.filterwarnings("ignore:adapt")  # the batches here are small
SHAPES = {"1d": (6, 3), "1d long": (6, 3, 5), "2d": (4, 3, 5, 2), "3d": (2, 3, 4, 2, 3)}


def make_norm(shape: tuple[int, ...], room=anynorm, kind: str = "BatchNorm", **options):
    """A norm in evaluation whose averages and gamma say something."""
    norm = getattr(room, f"{kind}{max(len(shape) - 2, 1)}d")(shape[1], **options).eval()
    with torch.no_grad():
        norm.running_mean.copy_(draw(shape[1], seed=1, mean=2))
        norm.running_var.copy_(draw(shape[1], seed=2).abs() + 0.5)
        norm.weight.copy_(draw(shape[1], seed=3))
        norm.bias.copy_(draw(shape[1], seed=4))
    return norm


def find_blended(norm, x: torch.Tensor, prior: float, mask: np.ndarray | None = None) -> np.ndarray:
    """Schneider et al. 2020: both moments weighed by N / (N + n) and n / (N + n), n samples; float64."""
    values, spread = wide(x), (1, -1) + (1,) * (x.dim() - 2)
    counted = np.ones(values.shape, bool) if mask is None else np.broadcast_to(mask, values.shape)
    n = int(counted.reshape(len(values), -1).any(1).sum())
    channels = [values[:, c][counted[:, c]] for c in range(values.shape[1])]
    pairs = (
        (wide(norm.running_mean), [c.mean() for c in channels]),
        (wide(norm.running_var), [c.var() for c in channels]),
    )
    mean, var = (prior / (prior + n) * old + n / (prior + n) * np.array(new) for old, new in pairs)
    gamma, beta = (wide(t).reshape(spread) for t in (norm.weight, norm.bias))
    axes = (0, *range(2, x.dim()))
    given = mean.reshape(spread), var.reshape(spread)
    y = reference.forward(values, axes, gamma, beta, eps=norm.eps, given=given)
    return np.where(counted, y, 0)


def hold(y: torch.Tensor, true: np.ndarray, factor: float = 8) -> None:
    """To factor * eps of the largest value."""
    eps = torch.finfo(y.dtype).eps
    assert np.abs(wide(y) - true).max() <= factor * eps * np.abs(true).max()


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prior", [0, 1, 16, 0.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("room", [nn, anynorm], ids=["torch", "ours"])
def test_equals_the_reference(room, shape, prior, dtype):
    norm = make_norm(shape, room, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    x = draw(*shape, mean=3, std=2).to(dtype)
    true = find_blended(norm, x, prior)
    with anynorm.adapt(norm, prior=prior), torch.no_grad():
        hold(norm(x), true)
    with torch.no_grad():
        outside = norm(x)
    assert np.abs(wide(outside) - true).max() > 0.1


@quiet
@pytest.mark.parametrize("kind", ["BatchNorm", "GhostBatchNorm", "BatchRenorm", "BatchNormAct"])
@pytest.mark.parametrize("prior", [0, 16])
@pytest.mark.parametrize("training", [False, True])
def test_other_batch_norms_adapt_as_one_batch(kind, prior, training):
    """Equals the reference; in training nothing is counted either."""
    options = {"ghost_size": 2} if kind == "GhostBatchNorm" else {}
    norm = make_norm(SHAPES["2d"], kind=kind, **options).train(training)
    if kind == "BatchNormAct":
        norm.activation = "identity"
    x, before = draw(*SHAPES["2d"], mean=3), photograph(norm)
    with anynorm.adapt(norm, prior=prior):
        hold(norm(x), find_blended(norm, x, prior))
    assert photograph(norm) == before


@quiet
@pytest.mark.parametrize("prior", [0, 4])
def test_masks_count_what_is_real(prior):
    """Equals the reference, and what padding holds changes no bit; a sample of padding alone is none."""
    norm = make_norm((4, 3, 5))
    x, lengths = draw(4, 3, 5, mean=3), torch.tensor([5, 2, 0, 3])
    mask = anynorm.mask_of(lengths, 5)
    true = find_blended(norm, x, prior, mask[:, None].numpy())
    with anynorm.adapt(norm, prior=prior) as adaptation:
        hold(norm(x, mask=mask), true)
        hold(norm(x, lengths=lengths), true)
        with anynorm.masked(mask):
            y = norm(x)
            other = norm(torch.where(mask[:, None], x, 77.0))
    assert torch.equal(y, other)
    hold(y, true)
    assert [entry.name for entry in adaptation.report.changed] == [""]


@quiet
def test_masks_reach_torchs_norms_too():
    """masked refuses torch's norms, which cannot take a mask; within adapt they are ours."""
    norm, mask = make_norm((4, 3, 5), nn), anynorm.mask_of([5, 2, 1, 3], 5)
    x = draw(4, 3, 5)
    with anynorm.adapt(norm, prior=4), anynorm.masked(mask):
        hold(norm(x), find_blended(norm, x, 4, mask[:, None].numpy()))


@quiet
def test_ragged_input_counts_sequences():
    """Equals the reference on the rows, with as many samples as sequences."""
    norm, rows = make_norm((7, 3)), draw(7, 3, mean=3)
    jagged = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 5, 7]))
    packed = nn.utils.rnn.pack_sequence([rows[:5], rows[5:]])
    weight, mean, var = 4 / 6, rows.double().mean(0), rows.double().var(0, unbiased=False)
    given = [
        wide(weight * old + (1 - weight) * new)
        for old, new in zip((norm.running_mean, norm.running_var), (mean, var), strict=True)
    ]
    true = reference.forward(wide(rows), (0,), wide(norm.weight), wide(norm.bias), eps=norm.eps, given=tuple(given))
    with anynorm.adapt(norm, prior=4):
        hold(norm(jagged).values(), true)
        y = nn.utils.rnn.unpack_sequence(norm(packed))
    hold(torch.cat(y), true)


@quiet
def test_memory_formats_are_kept():
    norm, x = make_norm((4, 3, 5, 2)), draw(4, 3, 5, 2).to(memory_format=torch.channels_last)
    for prior in (0, 16):
        with anynorm.adapt(norm, prior=prior):
            assert norm(x).is_contiguous(memory_format=torch.channels_last)


@quiet
def test_gradients_are_those_of_the_statistics_that_were_taken():
    """Equals float64 differences: through the batch without a prior, through constants with one."""
    norm = make_norm((5, 3), dtype=torch.float64)
    x = draw(5, 3, dtype=torch.float64).requires_grad_()
    with anynorm.adapt(norm):
        torch.autograd.gradcheck(norm, x)
    with anynorm.adapt(norm, prior=3):
        (found,) = torch.autograd.grad(norm(x).sum(), x)
        weight = 3 / 8
        var = weight * norm.running_var + (1 - weight) * x.var(0, unbiased=False)
        torch.testing.assert_close(found, (norm.weight / (var + norm.eps).sqrt()).expand(5, 3))


# ---- the way back ---------------------------------------------------------------------------------------------------


def make_mixed_net() -> nn.Sequential:
    """Norms of torch's and ours, a subclass, a synchronized one, hooks, and norms that are left."""

    class Quiet(nn.BatchNorm2d):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), anynorm.BatchNorm2d(6), Quiet(6), nn.SyncBatchNorm(6)),
        *(
            nn.GroupNorm(2, 6),
            nn.BatchNorm2d(6, track_running_stats=False),
            nn.InstanceNorm2d(6, track_running_stats=True),
        ),
        *(nn.Flatten(), nn.Linear(6 * 36, 4)),
    ).eval()
    model[1].register_forward_hook(lambda *_: None)
    model.register_forward_hook(lambda *_: None)
    return model


@quiet
@pytest.mark.parametrize("method", ["batch", "adabn", "tent"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_afterwards_as_before(method, error):
    model, x = make_mixed_net(), draw(9, 3, 8, 8, mean=2)
    options = {"loader": [x]} if method == "adabn" else {}
    before, weights = photograph(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(x)
    adaptation = anynorm.adapt(model, method, **options)
    for _ in range(2):
        try:
            with adaptation as entered, torch.no_grad():
                y = entered(x) if method == "tent" else model(x)
                assert not torch.allclose(y, plain, atol=0.1)
                if error is not None:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            assert error is not None
        assert photograph(model) == before
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert not BORROWED
    with torch.no_grad():
        assert torch.equal(model(x), plain)


def test_the_report_says_what_is_adapted_and_what_is_left():
    report = anynorm.adapt(make_mixed_net()).report
    assert [(entry.name, entry.kind) for entry in report.changed][::3] == [
        ("1", "torch.nn.BatchNorm2d"),
        ("4", "torch.nn.SyncBatchNorm"),
    ]
    assert {entry.name: entry.reason for entry in report.left} == {
        "6": "it keeps no running averages",
        "7": "its running averages are not those of a batch norm over (N, C, *)",
    }


class NormAct(nn.BatchNorm1d):
    """As other packages have it."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


def test_norms_of_other_packages_are_left_with_a_warning_until_something_is_known_of_them():
    model, x = nn.Sequential(nn.BatchNorm1d(3), NormAct(3)).eval(), draw(60, 3, mean=2)
    with pytest.warns(
        UserWarning, match=r"1 batch norms keep their running averages; the first is 1 \(.*NormAct\): a sub"
    ):
        anynorm.adapt(model)
    trusted = anynorm.adapt(model, trust=(NormAct,))
    assert [entry.name for entry in trusted.report.changed] == ["0", "1"]
    with trusted:
        y = model(x)
    once = nn.BatchNorm1d(3)(nn.BatchNorm1d(3)(x)).relu()
    torch.testing.assert_close(y, once)
    assert type(model[1]) is NormAct


@quiet
@pytest.mark.parametrize("first", ["adapt", "masked"])
def test_masks_of_a_model(first):
    """Invariant: in either order what padding holds changes nothing, in a model of torch's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3, stride=2, padding=1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)).eval()
    x, mask = draw(3, 1, 8), anynorm.mask_of([8, 5, 3], 8)
    contexts = [anynorm.adapt(model, prior=4), anynorm.masked(mask, model=model)]
    outer, inner = contexts if first == "adapt" else contexts[::-1]
    with outer, inner, torch.no_grad():
        assert torch.equal(model(x), model(torch.where(mask[:, None], x, 99.0)))


@quiet
@pytest.mark.parametrize("method", ["batch", "tent"])
def test_wrapped_models(method):
    """Invariant: what is inside adapts, and its predictions are looked at without the wrapper."""
    model, x = make_net().eval(), draw(9, 3, 8, 8, mean=2)
    wrapped = nn.DataParallel(model)
    with anynorm.adapt(model), torch.no_grad():
        true = model(x)
    with anynorm.adapt(wrapped, method) as adaptation, torch.no_grad():
        assert torch.equal(adaptation(x) if method == "tent" else wrapped(x), true)
    assert not wrapped._forward_hooks and not model._forward_hooks


@quiet
def test_threads_adapt_each_for_itself():
    """Invariant: on one model of torch's a thread in no context gets the running averages, others their own prior."""
    model, x = make_net().eval(), draw(6, 3, 8, 8, mean=2)
    with torch.no_grad():
        plain = model(x)
        alone = {}
        for prior in (0, 16):
            with anynorm.adapt(model, prior=prior):
                alone[prior] = model(x)
    found: dict[int, torch.Tensor] = {}
    entered, left = threading.Barrier(3), threading.Barrier(3)

    def run(prior: int) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            with anynorm.adapt(model, prior=prior):
                entered.wait(30)
                found[prior] = model(x)
                left.wait(30)
                if prior:  # the other has left
                    second.wait(30)
                    found[-1] = model(x)
            if not prior:
                second.set()

    second = threading.Event()
    threads = [threading.Thread(target=run, args=(prior,)) for prior in alone]
    for thread in threads:
        thread.start()
    entered.wait(30)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain)
    left.wait(30)
    for thread in threads:
        thread.join(30)
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[16], alone[16])
    assert torch.equal(found[-1], alone[16])
    assert type(model[1]) is nn.BatchNorm2d
    assert not BORROWED


@quiet
def test_contexts_nest_and_one_is_entered_once_at_a_time():
    model, x = make_net().eval(), draw(6, 3, 8, 8, mean=2)
    with anynorm.adapt(model, prior=16):
        outer = model(x)
        with anynorm.adapt(model):
            assert not torch.equal(model(x), outer)
        assert torch.equal(model(x), outer)
    with anynorm.adapt(model):
        anynorm.accelerate(model, undo=True)
    assert type(model[1]) is nn.BatchNorm2d
    assert not BORROWED
    adaptation = anynorm.adapt(model)
    with adaptation, pytest.raises(RuntimeError, match=r"entered once at a time; call anynorm\.adapt again"):
        adaptation.__enter__()


@quiet
def test_compiled_models_adapt_too():
    """Compiled code does not see the context, so it runs eagerly inside."""
    model, x = make_net().eval(), draw(6, 3, 8, 8, mean=2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        with anynorm.adapt(model):
            true = model(x)
        with anynorm.adapt(compiled):
            assert torch.equal(compiled(x), true)
        assert torch.equal(compiled(x), plain)
    assert not torch.allclose(plain, true, atol=0.1)


@quiet
def test_adabn_is_recalibrate():
    model, x = make_net().eval(), draw(40, 3, 8, 8, mean=2)
    with anynorm.adapt(model, "adabn", loader=x.split(10)):
        found = [t.clone() for t in model.buffers()]
    anynorm.recalibrate(model, x.split(10))
    assert all(torch.equal(a, b) for a, b in zip(found, model.buffers(), strict=True))


# ---- what is refused, and what is warned of --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "kind", "text"),
    [
        (3, {}, TypeError, "model must be a torch.nn.Module; got int"),
        (nn.LayerNorm(3), {}, anynorm.UserError, "must have a batch norm with running averages; got none; other"),
        (nn.BatchNorm1d(3, track_running_stats=False), {}, anynorm.UserError, "it keeps no running averages"),
        (nn.LazyBatchNorm1d(), {}, ValueError, "adapt: lazy modules must have seen an input"),
        (nn.BatchNorm1d(3), {"method": "bn"}, anynorm.UserError, "one of batch, adabn, tent; got 'bn'"),
        (nn.BatchNorm1d(3), {"prior": -1}, anynorm.UserError, "prior must be a number of 0 or more; got -1"),
        (nn.BatchNorm1d(3), {"prior": float("inf")}, anynorm.UserError, "got inf"),
        (nn.BatchNorm1d(3), {"method": "adabn"}, anynorm.UserError, "got no loader; pass loader="),
        (nn.BatchNorm1d(3), {"loader": []}, anynorm.UserError, "loader belongs to the method adabn"),
        (nn.BatchNorm1d(3), {"method": "tent", "prior": 16}, anynorm.UserError, "prior belongs to the method batch"),
        (nn.BatchNorm1d(3, affine=False), {"method": "tent"}, anynorm.UserError, "norms without parameters"),
    ],
)
def test_what_is_refused(model, options, kind, text):
    with pytest.raises(kind, match=text):
        anynorm.adapt(model, **options)


@pytest.mark.parametrize("prior", [0, 16])
def test_one_value_per_channel_is_refused_by_name(prior):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    with (
        anynorm.adapt(model, prior=prior),
        pytest.raises(anynorm.UserError, match=r"adapt: 1 .BatchNorm1d. must get more"),
    ):
        model(draw(1, 3))
    assert not BORROWED


def test_a_batch_that_is_noise_is_warned_of_once():
    """Of 4 samples that are not shifted the means are off by half a std: the number is in the text."""
    model = nn.Sequential(nn.BatchNorm1d(50)).eval()
    batches = [draw(4, 50, seed=seed) for seed in range(3)]
    text = r"a batch of 4 says too little: .* off by 0\.[45]\d std"
    with anynorm.adapt(model), pytest.warns(UserWarning, match=text) as seen:
        list(map(model, batches))
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("prior", "samples", "mean"), [(16, 4, 0.0), (0, 100, 0.0), (0, 4, 2.0)], ids=["prior", "large", "shifted"]
)
def test_a_batch_that_says_enough_is_not_warned_of(prior, samples, mean):
    model = nn.Sequential(nn.BatchNorm1d(50)).eval()
    with anynorm.adapt(model, prior=prior), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(draw(samples, 50, mean=mean))


def test_positions_of_a_sample_that_resemble_each_other_count_as_few():
    """100 equal positions are worth one: the count of values would hide it."""
    model = nn.Sequential(nn.BatchNorm1d(50)).eval()
    with anynorm.adapt(model), pytest.warns(UserWarning, match="a batch of 4 says too little"):
        model(draw(4, 50, 1).expand(4, 50, 100))
    with anynorm.adapt(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(draw(4, 50, 100))


def test_a_batch_of_one_class_is_warned_of():
    """Adapted predictions are spread over the classes; those of the running averages tell."""
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    x = draw(64, 4)
    one_class = x + torch.tensor([0.0, 9.0, 0.0, 0.0])
    with anynorm.adapt(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(x).argmax(1).unique().numel() == 4
    with (
        anynorm.adapt(model),
        pytest.warns(UserWarning, match="without adaptation class 1 is predicted for 100% of 64"),
    ):
        assert model(one_class).argmax(1).unique().numel() == 4


def test_the_look_without_adaptation_is_rare_and_leaves_no_trace():
    """On calls 1, 2, 4, 8; torch's random numbers and the averages stay."""
    calls = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return self.norm(x) + torch.rand(())

    model, x = Net().eval(), draw(64, 4)
    torch.manual_seed(0)
    with anynorm.adapt(model):
        for _ in range(8):
            last = model(x)
    assert len(calls) == 8 + 4
    torch.manual_seed(0)
    with anynorm.adapt(model.norm):
        for _ in range(8):
            again = model(x)
    assert torch.equal(last, again)
