"""adapt: the model is afterwards what it was, and threads, masks, wrappers and compilers go with it."""

import contextvars
import threading
import warnings

import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm.surgery.adaptation.norms import BORROWED
from surgery.recalibration_cases import draw, make_net, photograph

quiet = pytest.mark.filterwarnings("ignore:adapt")  # the batches here are small


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


@quiet
def test_threads_leave_the_compiler_as_it_was():
    """Also where the first to enter is the first to leave."""
    import torch._dynamo

    graphs, x = [], draw(6, 3)
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    first, second = anynorm.adapt(model), anynorm.adapt(model)
    contexts = [contextvars.copy_context() for _ in range(2)]
    contexts[0].run(first.__enter__)
    contexts[1].run(second.__enter__)
    contexts[0].run(first.__exit__)
    contexts[1].run(second.__exit__)
    torch._dynamo.reset()
    torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)(x)
    assert graphs


def test_norms_that_are_frozen_stand_still_inside_and_those_frozen_inside_stay_frozen():
    model = nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(64, 4) + 3
    anynorm.freeze(model, updates=False)
    with anynorm.adapt(model):
        model(x)
    assert model[0].num_batches_tracked == 0
    anynorm.unfreeze(model)
    with anynorm.adapt(model):
        anynorm.freeze(model)
    model.train()(x)
    assert model[0].num_batches_tracked == 0
    anynorm.unfreeze(model)
    model.train()(x)
    assert model[0].num_batches_tracked == 1
