"""Domain batch norm: each domain is a batch norm of its own, and nothing takes one for another."""

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import anynorm
from modules.domain_cases import DOMAINS, SHAPES, copy_of, make, train
from surgery.recalibration_cases import draw, find_truth, hold

NO_DOMAIN = r'DomainBatchNorm2d\(3\): the domain must be one of day, night; got {}; call .* anynorm\.domain\("day"\)'


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", SHAPES)
def test_each_domain_equals_an_ordinary_batch_norm(n, shared, momentum):
    """Equals ours, bit by bit: outputs, gradients, averages and counters, in training and evaluation."""
    norm = make(n, shared_affine=shared, momentum=momentum)
    with torch.no_grad():
        for index, p in enumerate(norm.parameters()):
            p.copy_(draw(3, seed=index))
    twins = {name: copy_of(norm, name) for name in DOMAINS}
    for step, name in enumerate(("day", "night", "night", "day", "night")):
        x = draw(*SHAPES[n], seed=step, mean=step).requires_grad_()
        with anynorm.domain(name):
            y, true = norm(x), twins[name](x)
            assert torch.equal(y, true)
            found = torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias])
            wanted = torch.autograd.grad(true.square().sum(), [x, twins[name].weight, twins[name].bias])
            assert all(map(torch.equal, found, wanted))
    assert [int(norm.num_batches_tracked_day), int(norm.num_batches_tracked_night)] == [2, 3]
    for name in DOMAINS:
        with anynorm.domain(name):
            assert torch.equal(norm.eval()(x), twins[name].eval()(x))
            assert torch.equal(norm.running_var, twins[name].running_var)


def test_masks_lengths_and_ragged_input():
    norm, x = make(1), draw(4, 3, 5, mean=2)
    twin, mask = copy_of(norm, "night"), anynorm.mask_of([5, 2, 0, 3], 5)
    with anynorm.domain("night"):
        assert torch.equal(norm(x, mask=mask), twin(x, mask=mask))
        assert torch.equal(norm(x, lengths=[5, 2, 0, 3]), twin(x, mask=mask))
        with anynorm.masked(mask):
            assert torch.equal(norm(x), twin(x))
        rows = torch.nested.nested_tensor_from_jagged(draw(7, 3), torch.tensor([0, 5, 7]))
        assert torch.equal(norm(rows).values(), twin(rows).values())
        assert torch.equal(norm.running_mean, twin.running_mean)
    assert int(norm.num_batches_tracked_day) == 0


# ---- which domain ----------------------------------------------------------------------------------------------------


def test_without_a_domain_and_in_an_unknown_one_the_error_names_them():
    norm, x = make(), draw(*SHAPES[2])
    for given in (norm, norm.eval()):
        with pytest.raises(anynorm.UserError, match=NO_DOMAIN.format("none chosen")):
            given(x)
        with anynorm.domain("dusk"), pytest.raises(anynorm.UserError, match=NO_DOMAIN.format("'dusk'")):
            given(x)
    assert int(norm.num_batches_tracked_day) == 0
    assert not hasattr(norm, "running_mean")
    with pytest.raises(AttributeError, match=NO_DOMAIN.format("none chosen")):
        norm.running_mean.add_(1)
    with pytest.raises(AttributeError, match="no attribute 'running_median'"):
        norm.running_median


def test_contexts_nest_and_are_left_by_exceptions():
    norm = make()
    with anynorm.domain("day"):
        with anynorm.domain("night"):
            assert norm.running_mean is norm.running_mean_night
        with pytest.raises(ValueError, match="4D"), anynorm.domain("night"):
            norm(torch.zeros(3))
        assert norm.running_mean is norm.running_mean_day


def test_threads_choose_each_for_themselves():
    norm, met = make().eval(), threading.Barrier(2)
    norm.running_mean_night.fill_(3)
    found = {}

    def run(name: str) -> None:
        with anynorm.domain(name):
            met.wait(30)
            found[name] = norm(torch.zeros(SHAPES[2])).mean().item()
            met.wait(30)

    threads = [threading.Thread(target=run, args=(name,)) for name in DOMAINS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found["day"] == 0
    assert found["night"] == pytest.approx(-3, rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_computes_again_in_the_same_domain(reentrant):
    """Outside the context, and inside another; the recomputation counts no batch, in neither domain."""
    norm, x = make(), draw(*SHAPES[2]).requires_grad_()
    with torch.no_grad():
        norm.running_mean_night.fill_(3)
    norm.eval()
    with anynorm.domain("night"):
        wanted = torch.autograd.grad(norm(x).square().sum(), x)[0]
        y = checkpoint(norm, x, use_reentrant=reentrant)
    with anynorm.domain("day"):
        y.square().sum().backward()
    assert torch.equal(x.grad, wanted)
    norm.train()
    with anynorm.domain("night"):
        y = checkpoint(norm, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert [int(norm.num_batches_tracked_day), int(norm.num_batches_tracked_night)] == [0, 1]


# ---- what else works with it -----------------------------------------------------------------------------------------


def test_torch_compile_is_right_when_the_domain_changes():
    norm = make().eval()
    norm.running_mean_night.fill_(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU()).eval()
    compiled, x = torch.compile(model, backend="eager"), draw(*SHAPES[2])
    for name in ("day", "night", "day"):
        with anynorm.domain(name), torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(anynorm.UserError, match="none chosen"):
        compiled(x)


def test_an_exported_graph_has_the_domain_that_was_chosen():
    norm, x = make().eval(), draw(*SHAPES[2])
    norm.running_mean_night.fill_(3)
    with anynorm.domain("night"):
        true, exported = norm(x), torch.export.export(nn.Sequential(norm), (x,), strict=False).module()
    torch.testing.assert_close(exported(x), true)


def test_no_compiler_is_loaded_for_it():
    code = (
        "import sys, torch, anynorm\n"
        "with anynorm.domain('day'): anynorm.DomainBatchNorm1d(2, domains=['day'])(torch.randn(4, 2))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_fx_records_the_module_and_no_domain():
    norm, x = make().eval(), draw(*SHAPES[2])
    norm.running_mean_night.fill_(3)
    traced = torch.fx.symbolic_trace(nn.Sequential(norm))
    for name in DOMAINS:
        with anynorm.domain(name):
            assert torch.equal(traced(x), norm(x))


def test_distributed_data_parallel(tmp_path):
    """Equals training without it, one rank; gammas of the other domain have no gradient."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        norm = make(shared_affine=False)
        twin = copy.deepcopy(norm)
        train(nn.parallel.DistributedDataParallel(norm, find_unused_parameters=True))
        train(twin)
        assert all(map(torch.equal, norm.state_dict().values(), twin.state_dict().values()))
    finally:
        dist.destroy_process_group()


def test_recalibrate_and_adapt_are_of_the_chosen_domain():
    model, x = nn.Sequential(make(), nn.Conv2d(3, 3, 1)), draw(40, 3, 5, 2, mean=2)
    with pytest.raises(AttributeError, match="the domain must be one of day, night"):
        anynorm.recalibrate(model, [x])
    with anynorm.domain("night"):
        anynorm.recalibrate(model.eval(), x.split(10))
        hold(model[0], *find_truth(x))
        assert not model[0].training
        with anynorm.adapt(model[0]):
            torch.testing.assert_close(model[0](x + 7), nn.BatchNorm2d(3)(x))
        anynorm.adapt(model[0], "adabn", loader=[x + 7]).__enter__().__exit__()
        hold(model[0], *find_truth(x))
    assert [int(model[0].num_batches_tracked_day), int(model[0].num_batches_tracked_night)] == [0, 4]
    assert bool((model[0].running_mean_day == 0).all())


def test_accumulate_is_that_of_an_ordinary_batch_norm():
    model, parts = nn.Sequential(make(1)), draw(8, 3, 5, mean=2).split(3)
    twin = nn.Sequential(copy_of(model[0], "night"))
    with anynorm.domain("night"):
        for each in (model, twin):
            anynorm.accumulate(each, list(parts), lambda m, part: m(part).pow(3).sum())
        assert torch.equal(model[0].weight.grad, twin[0].weight.grad)
        assert torch.equal(model[0].running_var, twin[0].running_var)
    assert [int(model[0].num_batches_tracked_day), int(model[0].num_batches_tracked_night)] == [0, 1]


def test_other_operations_leave_it_and_say_so():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make())
    assert not anynorm.accelerate(model, fuse=True).changed
    assert "torch.nn has no such norm" in str(anynorm.accelerate(model, undo=True))
    assert "1" in [entry.name for entry in anynorm.sync(model).left]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = anynorm.param_groups(nn.Sequential(make(shared_affine=False)), 0.1)
    assert [len(group["params"]) for group in groups] == [0, 4]
    # torch's tools, which would keep one domain, meet the error where none is chosen.
    with pytest.raises(AttributeError, match="the domain must be one of"):
        nn.utils.fuse_conv_bn_eval(model[0].eval(), model[1].eval())
    with pytest.raises(AttributeError, match="the domain must be one of"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
