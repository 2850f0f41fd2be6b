"""The monitor keeps an invariant: what is trained is bit for bit what it would be without it, in every surrounding."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import anynorm
from anynorm.doctor.monitor.hook import ignore
from doctor.monitored import X, keep, make_net, train

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(first: nn.Module, second: nn.Module, outputs) -> None:
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


FORMS = {
    "torch": lambda model: model,
    "accelerated": lambda model: anynorm.accelerate(model).model,
    "fused": lambda model: anynorm.accelerate(model, fuse=True).model,
    "frozen": lambda model: anynorm.freeze(model).model,
    "frozen, updates": lambda model: anynorm.freeze(model, updates=False, affine=False).model,
    "ghost": lambda model: anynorm.convert(model, to="ghost", ghost_size=4).model,
    "renorm": lambda model: anynorm.convert(model, to="renorm").model,
}


@pytest.mark.filterwarnings("ignore:anynorm.freeze")
@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_is_trained_changes(form):
    plain, watched = FORMS[form](make_net()), FORMS[form](make_net())
    expected = train(plain)
    random = torch.get_rng_state()
    with anynorm.Monitor(watched, every=2) as monitor:
        found = train(watched)
        assert torch.equal(torch.get_rng_state(), random)
    assert_same(plain, watched, (expected, found))
    assert monitor.step == 5
    assert [record.calls for record in monitor.records.values()] == [1, 1]
    assert not watched._forward_pre_hooks and not any(module._forward_pre_hooks for module in watched.modules())


def test_steps_are_training_forwards_with_gradients():
    model = make_net()
    with anynorm.Monitor(model, every=2) as monitor:
        model.eval()(X)
        with torch.no_grad():
            model.train()(X)
        assert monitor.step == 0
        model(X)
        assert (monitor.step, [*monitor.records]) == (1, ["1", "5"])
        before = monitor.records
        model(X)
        assert monitor.records is before
        model(X)
        assert [record.step for record in monitor.records.values()] == [2, 2]


def test_hooks_of_norms_are_there_in_measured_steps_alone():
    model, seen = make_net(), []
    model[1].register_forward_hook(lambda *_: seen.append(len(model[1]._forward_pre_hooks)))
    with anynorm.Monitor(model, every=3):
        train(model, 7)
    assert seen == [1, 0, 0, 1, 0, 0, 1]


def test_an_exception_leaves_nothing_behind_and_the_next_step_is_measured():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.fails = make_net(), False

        def forward(self, x):
            y = self.net[1](self.net[0](x))
            if self.fails:
                raise RuntimeError("out of memory")
            return self.net[2:](y)

    model = Net()
    with anynorm.Monitor(model, every=1) as monitor:
        model.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            model(X)
        assert not model.net[1]._forward_pre_hooks and not model._forward_hooks
        model.fails = False
        train(model, 1)
        assert {record.step for record in monitor.records.values()} == {1}
    with pytest.raises(KeyError), anynorm.Monitor(model):
        raise KeyError
    assert not model._forward_pre_hooks


def test_copies_and_pickles_know_nothing_of_the_monitor(tmp_path):
    model = make_net()
    with anynorm.Monitor(model, tmp_path / "run.sqlite", every=1) as monitor:
        y = model(X)  # gradients are still awaited
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        y.sum().backward()
        for each in copies:
            assert [*each._forward_pre_hooks.values()] == [ignore]
            train(each, 2)
        assert monitor.step == 1
        assert all(record.gradient > 0 for record in monitor.records.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_again_is_no_second_call(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            y = checkpoint(self.net[:4], x.requires_grad_(), use_reentrant=reentrant)
            return self.net[4:](y)

    model = Net()
    with anynorm.Monitor(model, every=1) as monitor:
        train(model, 2, X.clone())
    assert monitor.step == 2
    assert [(name, record.calls) for name, record in monitor.records.items()] == [("net.1", 1), ("net.5", 1)]
    assert all(record.gradient > 0 for record in monitor.records.values())


def test_two_calls_of_a_norm_are_pooled():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x[:4]).sum() + self.norm(x[4:]).sum()

    model = Twice()
    with anynorm.Monitor(model) as monitor:
        model(X)
    record, x = monitor.records["norm"], X.double()
    assert record.calls == 2
    gap = (x.mean((0, 2, 3)) / (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()).abs()
    assert (record.gap, record.gap_worst) == pytest.approx((float(gap.median()), float(gap.max())), rel=1e-6)


def test_gradients_that_come_after_other_forwards_are_taken():
    model, x = make_net(), X
    with anynorm.Monitor(model, every=3) as monitor:
        records = keep(monitor)
        first, second = model(x), model(x)
        (first.sum() + second.sum()).backward()
        model(x)
        assert not records
        model(x)  # the next that is measured, and no backward of it
        assert [record.gradient > 0 for record in records] == [True, True]
    assert [record.step for record in records] == [0, 0, 3, 3]
    assert [record.gradient > 0 for record in records] == [True, True, False, False]


def test_compiled_the_numbers_come_from_the_averages():
    torch.compiler.reset()
    model, watched, eager = make_net(), make_net(), make_net()
    expected = train(model, call=torch.compile(model, backend="aot_eager", fullgraph=True))
    compiled = torch.compile(watched, backend="aot_eager", fullgraph=True)
    with anynorm.Monitor(eager, every=2) as plain:
        train(eager)
    with anynorm.Monitor(compiled, every=2) as monitor:
        found = train(watched, call=compiled)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    ours, theirs = monitor.records["1"], plain.records["1"]
    assert ours.calls == 0
    for name in ("gap", "gap_worst", "ratio", "mean", "std", "gamma_min"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-2), name
    assert ours.noise != ours.noise
    assert ours.gradient > 0


def test_a_model_that_is_called_in_another_way_is_said_at_the_end():
    torch.compiler.reset()
    model = make_net()
    monitor = anynorm.Monitor(model)
    train(model, 2, call=torch.compile(model, backend="aot_eager", fullgraph=True))
    with pytest.warns(UserWarning, match="no training step was seen"):
        monitor.close()
    monitor.close()
    model.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="must not be compiled in place"):
        anynorm.Monitor(model)


def test_names_are_those_of_the_model_inside_its_wrappers():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        model, plain = make_net(), make_net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with anynorm.Monitor(wrapped, every=2) as monitor:
            found = train(model, call=wrapped)
        assert_same(model, plain, (found, train(plain)))
        assert [*monitor.records] == ["1", "5"]
        assert all(record.gradient > 0 for record in monitor.records.values())
    finally:
        torch.distributed.destroy_process_group()


def test_names_are_found_through_compiled_parts_and_own_attributes():
    model = nn.ModuleDict({"module": nn.BatchNorm1d(3), "part": torch.compile(nn.Sequential(nn.BatchNorm1d(3)))})
    assert [*anynorm.Monitor(model).norms] == ["module", "part.0"]


def test_only_the_first_rank_measures(monkeypatch, tmp_path):
    monkeypatch.setattr("anynorm.doctor.monitor.monitor.find_rank", lambda: 1)
    model = make_net()
    with anynorm.Monitor(model, tmp_path / "run.csv"):
        train(model, 1)
    assert not [*tmp_path.iterdir()]


def test_lazy_norms_adapted_norms_and_norms_without_gamma_are_measured():
    class RMSNorm(nn.Module):  # of somebody else, as transformers has it
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    RMSNorm.__module__, RMSNorm.__qualname__ = "transformers.models.llama.modeling_llama", "LlamaRMSNorm"
    model = nn.Sequential(nn.LazyBatchNorm2d(), RMSNorm(), nn.InstanceNorm2d(3), nn.LayerNorm(8))
    with anynorm.Monitor(model) as monitor:
        model(X).sum().backward()
    assert [*monitor.records] == ["0", "1", "2", "3"]
    records = [*monitor.records.values()]
    assert [record.gamma_max for record in records[:2]] == [1, 1]
    assert records[2].gamma_max != records[2].gamma_max
    anynorm.accelerate(model)
    with anynorm.Monitor(model) as monitor:
        model(X).sum().backward()
    assert monitor.records["1"].std == pytest.approx(records[1].std, rel=0.05)


def test_a_norm_that_cannot_be_measured_ends_no_training(monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("of a measurement")

    monkeypatch.setattr("anynorm.doctor.monitor.measure.find_channel_moments", fail)
    model = make_net()
    with pytest.warns(UserWarning, match="1 .*could not be measured: ZeroDivisionError") as said:
        with anynorm.Monitor(model, every=1):
            train(model, 3)
    assert len(said) == 1


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="every must be at least 1; got 0"):
        anynorm.Monitor(make_net(), every=0)
    with pytest.raises(ValueError, match="must have a norm; got none in"):
        anynorm.Monitor(nn.Linear(2, 2))


def test_a_warning_that_is_an_error_comes_when_all_is_in_order():
    model = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = anynorm.Monitor(model, every=1)
        with pytest.raises(UserWarning, match="NaN or infinity reached it"):
            model(X * torch.inf)
    assert not model[1]._forward_pre_hooks and not model._forward_hooks
    monitor.close()


def test_what_others_trace_or_transform_is_no_step():
    model = make_net(nn.GroupNorm(2, 6))  # functions may not move averages in a transform
    with anynorm.Monitor(model, every=1) as monitor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, X, check_trace=False)
        assert "var_mean" not in str(traced.inlined_graph)
        parameters = dict(model.named_parameters())
        torch.func.grad(lambda given: torch.func.functional_call(model, given, (X,)).sum())(parameters)
        torch.export.export(model, (X,))
        assert monitor.step == 0
        model(X)
        assert monitor.step == 1


def test_a_forward_that_was_interrupted_leaves_no_hook_in_the_next_step():
    model, seen = make_net(), []

    def interrupt(module, args):
        seen.append(len(model[1]._forward_pre_hooks))
        if len(seen) == 1:
            raise KeyboardInterrupt

    model[2].register_forward_pre_hook(interrupt)
    with anynorm.Monitor(model, every=5) as monitor:
        with pytest.raises(KeyboardInterrupt):
            model(X)
        assert not train(model, 2)[0].isnan().any()
    assert seen == [1, 0, 0]
    assert not monitor.records


def test_a_loop_of_its_own_says_where_a_step_begins_and_its_forward_ends():
    model = make_net()
    with anynorm.Monitor(model, every=2, manual=True) as monitor:
        records = keep(monitor)
        for _ in range(3):
            monitor.begin_step()
            y = model[1](model[0](X))
            monitor.end_forward()
            model[1](model[0](X))  # not of the step
            y.square().sum().backward()
    assert [(record.step, record.layer, record.calls) for record in records] == [(0, "1", 1), (2, "1", 1)]
    assert all(record.gradient > 0 for record in records)


def test_what_has_no_numbers_ends_no_training():
    model = nn.Sequential(nn.BatchNorm1d(4, device="meta"), nn.Linear(4, 2, device="meta"))
    with pytest.warns(UserWarning, match="0 .*could not be measured: RuntimeError"):
        with anynorm.Monitor(model):
            model(torch.randn(3, 4, device="meta")).sum().backward()


def test_a_model_that_is_computed_again_as_a_whole_is_one_step():
    model = make_net()
    with anynorm.Monitor(model, every=1) as monitor:
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert monitor.step == 1
    assert [record.calls for record in monitor.records.values()] == [1, 1]


@pytest.mark.parametrize("norm", ["layer", "batch-sequence"])
def test_norms_inside_of_a_recurrent_layer_are_seen(norm):
    model = nn.Sequential(anynorm.LSTM(3, 4, norm=norm))
    with anynorm.Monitor(model) as monitor:
        model(torch.randn(5, 4, 3))[0].sum().backward()
    record = monitor.records["0.norm_ih_l0"]
    assert record.std > 0 and record.gradient > 0


def test_micro_batches_of_one_batch_are_not_said_to_be_small():
    def accumulate(watched):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), anynorm.BatchNorm1d(6), nn.Linear(6, 2))
        monitor = anynorm.Monitor(model, every=1) if watched else None
        for _ in range(3):
            anynorm.accumulate(model, X.split(2), lambda model, x: model(x).square().mean())
        if monitor is not None:
            assert monitor.step > 0
            assert monitor.records["2"].noise != monitor.records["2"].noise
            monitor.close()
        return [*model.state_dict().values(), *(p.grad for p in model.parameters())]

    for one, other in zip(accumulate(True), accumulate(False), strict=True):
        assert torch.equal(one, other)
