"""What torch.nn does, ours do: constructors, attributes, outputs, gradients, buffers, checkpoints, errors."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import anynorm
from anynorm import FAMILY
from anynorm.surgery.accelerate import PAIRS
from anynorm.torch_private import TORCH
from specimens import LAYOUTS, SPECIMENS, TRACKING

KINDS = [kind.__name__ for kind in PAIRS]
ids = {"ids": str}


def pair(specimen, **options) -> tuple[nn.Module, nn.Module]:
    return specimen.make(anynorm, **options), specimen.make(nn, **options)


def assert_same_step(ours, theirs, x, g=None) -> None:
    """Equal to 3e-4 of the largest value: the tolerance is for torch, ours is held to the reference elsewhere."""
    results = []
    for module in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        parameters = list(module.parameters())
        results.append((y, *torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y) if g is None else g)))
    for mine, its in zip(*results, strict=True):
        largest = max(1.0, float(its.detach().abs().max())) if its.numel() else 1.0
        torch.testing.assert_close(mine, its, rtol=0, atol=3e-4 * largest)
    for mine, its in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_constructor_is_torchs(kind):
    ours, theirs = getattr(anynorm, kind), getattr(nn, kind)
    known = list(inspect.signature(theirs).parameters.values())
    shown = list(inspect.signature(ours).parameters.values())
    assert shown[: len(known)] == known
    added = [parameter.name for parameter in shown[len(known) :]]
    assert added == (["on_single", "on_nonfinite"] if kind in FAMILY["batch"].classes else [])
    assert ours._version == theirs._version
    assert issubclass(ours, theirs)


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_attributes_repr_and_state_names(specimen):
    ours, theirs = pair(specimen)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {k for k in vars(ours)} == {k for k in vars(theirs)}
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_outputs_and_all_gradients(specimen, layout):
    ours, theirs = pair(specimen)
    assert_same_step(ours, theirs, specimen.draw(layout), specimen.draw(seed=5))


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("specimen", TRACKING, **ids)
def test_buffers_over_several_steps(specimen, momentum):
    ours, theirs = pair(specimen, momentum=momentum, track_running_stats=True)
    for step in range(5):
        x = specimen.draw(seed=step)
        assert_same_step(ours, theirs, x, specimen.draw(seed=50 + step))
    assert_same_step(ours.eval(), theirs.eval(), specimen.draw(seed=9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], **ids)
@pytest.mark.parametrize("specimen", TRACKING, **ids)
def test_buffers_keep_their_dtype(specimen, dtype):
    ours, theirs = pair(specimen, dtype=dtype, track_running_stats=True)
    for step in range(3):
        ours(specimen.draw(dtype=dtype, seed=step)), theirs(specimen.draw(dtype=dtype, seed=step))
    eps = torch.finfo(dtype).eps
    for mine, its in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert mine.dtype == its.dtype
        # torch rounds the batch's statistics to the half type as well, so it may be several ulps off.
        torch.testing.assert_close(mine, its, rtol=6 * eps, atol=6 * eps)


@pytest.mark.parametrize("specimen", TRACKING, **ids)
def test_without_running_statistics(specimen):
    ours, theirs = pair(specimen, track_running_stats=False)
    for training in (True, False):
        assert_same_step(ours.train(training), theirs.train(training), specimen.draw())


def network(library, first=nn) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), library.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), library.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), library.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU(),
        nn.Flatten(), library.LayerNorm(8 * 6 * 6), nn.Linear(8 * 6 * 6, 12), library.RMSNorm(12),
        library.BatchNorm1d(12, momentum=None), nn.Linear(12, 4),
    )  # fmt: skip


def train(model, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 3, 12, 12, generator=generator) + 1
        target = torch.randint(0, 4, (6,), generator=generator)
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("source", "target"), [(nn, anynorm), (anynorm, nn)], ids=["from torch", "to torch"])
def test_checkpoints_after_training_load_strictly_and_training_goes_on(source, target):
    before, after = network(source), network(target)
    train(before, 4, seed=1)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert train(after, 4, seed=2) == pytest.approx(train(before, 4, seed=2), rel=1e-3)
    for (name, mine), its in zip(after.state_dict().items(), before.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    probe = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(after.eval()(probe), before.eval()(probe), rtol=1e-3, atol=1e-3)


def test_old_checkpoint_without_counter_loads():
    state = nn.BatchNorm1d(3).state_dict()
    state._metadata[""]["version"] = 1
    del state["num_batches_tracked"]
    assert anynorm.BatchNorm1d(3).load_state_dict(state).missing_keys == []


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_pickle_and_deepcopy(specimen):
    module, x = specimen.make(), specimen.draw()
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(twin) is type(module)
        assert torch.equal(twin.eval()(x), copy.deepcopy(module).eval()(x))


@pytest.mark.parametrize("specimen", SPECIMENS, **ids)
def test_hooks_see_the_call(specimen):
    module, seen = specimen.make(), []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, y: seen.append("after"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    module(specimen.draw().requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_empty_batch_leaves_statistics_alone(kind):
    ours, theirs = getattr(anynorm, kind)(3), getattr(nn, kind)(3)
    x = torch.zeros(0, 3, *[4] * (int(kind[-2]) if kind != "BatchNorm1d" else 0))
    assert_same_step(ours, theirs, x)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm1d"])
def test_empty_batch_of_the_others(kind):
    arguments = {"GroupNorm": (2, 4), "InstanceNorm1d": (4,)}.get(kind, (3,))
    assert_same_step(getattr(anynorm, kind)(*arguments), getattr(nn, kind)(*arguments), torch.zeros(0, 4, 3))


@pytest.mark.parametrize("kind", [f"Lazy{k}Norm{d}d" for k in ("Batch", "Instance") for d in (1, 2, 3)])
def test_lazy_becomes_ours(kind):
    ours, theirs = getattr(anynorm, kind)(), getattr(nn, kind)()
    x = torch.randn(4, 5, *[3] * int(kind[-2]))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert type(ours) is getattr(anynorm, kind.removeprefix("Lazy"))
    assert repr(ours) == repr(theirs)
    for mine, its in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("kind", ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"])
def test_instance_norm_without_a_sample_axis(kind):
    x = torch.randn(4, *[5] * int(kind[-2]))
    assert_same_step(getattr(anynorm, kind)(4, affine=True), getattr(nn, kind)(4, affine=True), x)


def test_instance_norm_warns_of_other_channels_as_torch():
    for library in (nn, anynorm):
        with pytest.warns(UserWarning, match="does not match|to match num_features"):
            assert library.InstanceNorm1d(4)(torch.randn(2, 5, 3)).shape == (2, 5, 3)


STRIDES = [("BatchNorm2d", (4,)), ("GroupNorm", (2, 4)), ("LayerNorm", ((4, 3, 3),)), ("RMSNorm", ((4, 3, 3),))]


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(("kind", "arguments"), [*STRIDES, ("InstanceNorm2d", (4,))])
def test_memory_format(kind, arguments, needs_grad):
    """channels_last is kept; any other layout gives contiguous output, so that a following view works as with torch."""
    module = getattr(anynorm, kind)(*arguments)
    last = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_(needs_grad)
    y = module(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for x in (torch.randn(2, 3, 3, 4).transpose(1, 3), torch.randn(4, 2, 3, 3).transpose(0, 1)):
        assert module(x.requires_grad_(needs_grad)).is_contiguous() or x.is_contiguous(
            memory_format=torch.channels_last
        )


def outcome(call) -> type | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except Exception as error:
            return type(error)
    return None


BAD = {
    "wrong channels": lambda lib, f: lib.BatchNorm2d(3)(torch.zeros(2, 4, 4, 4)),
    "wrong axes": lambda lib, f: lib.BatchNorm2d(3)(torch.zeros(2, 3, 4)),
    "one value per channel": lambda lib, f: lib.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1)),
    "integers": lambda lib, f: lib.BatchNorm2d(3)(torch.zeros(2, 3, 4, 4, dtype=torch.int64)),
    "complex": lambda lib, f: lib.BatchNorm2d(3)(torch.zeros(2, 3, 4, 4, dtype=torch.complex64)),
    "float64 input": lambda lib, f: lib.BatchNorm2d(3)(torch.zeros(2, 3, 4, 4, dtype=torch.float64)),
    "half parameters": lambda lib, f: lib.LayerNorm(4, dtype=torch.bfloat16)(torch.zeros(2, 4)),
    "eps 0": lambda lib, f: f.batch_norm(torch.zeros(4, 3), None, None, training=True, eps=0.0),
    "eps -1": lambda lib, f: f.batch_norm(torch.zeros(4, 3), torch.zeros(3), torch.ones(3), eps=-1.0),
    "no statistics": lambda lib, f: f.batch_norm(torch.zeros(4, 3), None, None),
    "mean alone": lambda lib, f: f.batch_norm(torch.zeros(4, 3), torch.zeros(3), None, training=True),
    "var missing": lambda lib, f: f.batch_norm(torch.zeros(4, 3), torch.zeros(3), None),
    "one axis": lambda lib, f: f.batch_norm(torch.zeros(4), None, None, training=True),
    "weight size": lambda lib, f: f.batch_norm(torch.zeros(4, 3), None, None, torch.ones(4), training=True),
    "buffer size": lambda lib, f: f.batch_norm(torch.zeros(4, 3), torch.zeros(4), torch.ones(4), training=True),
    "normalized_shape": lambda lib, f: lib.LayerNorm(5)(torch.zeros(2, 4)),
    "integer normalized_shape": lambda lib, f: f.layer_norm(torch.zeros(2, 4), 4),
    "empty normalized_shape": lambda lib, f: f.layer_norm(torch.zeros(2, 4), []),
    "layer weight shape": lambda lib, f: f.layer_norm(torch.zeros(2, 4), [4], torch.ones(3)),
    "layer integers": lambda lib, f: f.layer_norm(torch.ones(2, 4).long(), [4]),
    "rms shape": lambda lib, f: lib.RMSNorm(5)(torch.zeros(2, 4)),
    "rms integers": lambda lib, f: f.rms_norm(torch.ones(2, 4).long(), [4]),
    "groups in constructor": lambda lib, f: lib.GroupNorm(32, 30),
    "groups": lambda lib, f: f.group_norm(torch.zeros(2, 30, 4), 32),
    "negative groups": lambda lib, f: f.group_norm(torch.zeros(2, 30, 4), -2),
    "group one axis": lambda lib, f: f.group_norm(torch.zeros(2), 1),
    "one value per group": lambda lib, f: f.group_norm(torch.zeros(1, 4), 4),
    "group weight": lambda lib, f: f.group_norm(torch.zeros(2, 4, 3), 2, torch.ones(3)),
    "one position": lambda lib, f: lib.InstanceNorm1d(4)(torch.zeros(2, 4, 1)),
    "instance affine channels": lambda lib, f: lib.InstanceNorm1d(4, affine=True)(torch.zeros(2, 5, 3)),
    "instance tracked channels": lambda lib, f: lib.InstanceNorm1d(4, track_running_stats=True)(torch.zeros(2, 5, 3)),
    "instance one axis": lambda lib, f: lib.InstanceNorm1d(4)(torch.zeros(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_are_of_torchs_type(name):
    theirs = outcome(lambda: BAD[name](nn, F))
    if theirs is None and TORCH < (2, 10):
        pytest.skip("torch before 2.10 raises nothing here")
    ours = outcome(lambda: BAD[name](anynorm, anynorm.functional))
    assert theirs is not None
    assert ours is not None
    assert issubclass(ours, theirs)


def test_a_refused_batch_changes_nothing():
    norm = anynorm.BatchNorm1d(3)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.ones(1, 3))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("kind", ["BatchNorm2d", "InstanceNorm2d"])
def test_a_subclass_may_take_other_axes(kind):
    """Overriding torch's hook, as norms of any dimension do."""
    x = torch.randn(2, 3, 4)
    if kind == "InstanceNorm2d":
        x = x[None]
    for library in (nn, anynorm):
        own = type("Own", (getattr(library, kind),), {"_check_input_dim": lambda self, input: None})
        assert own(3 if kind == "BatchNorm2d" else 2)(x).shape == x.shape


@pytest.mark.parametrize("was_masked", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_go_to_torch(layout, was_masked):
    for kind in ("LayerNorm", "RMSNorm"):
        norm = getattr(anynorm, kind)(4)
        if was_masked:
            with anynorm.masked(torch.ones(2, 3)):
                norm(torch.randn(2, 3, 4))
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
        if kind == "RMSNorm" and layout == torch.strided:
            with pytest.raises(RuntimeError):  # torch has no such operation
                getattr(nn, kind)(4)(nested)
            continue
        torch.testing.assert_close(norm(nested).unbind()[1], getattr(nn, kind)(4)(nested).unbind()[1])


def test_checkpoints_load_into_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        norm = anynorm.BatchNorm1d(3)
        norm.load_state_dict(anynorm.BatchNorm1d(3).state_dict())


def test_signatures_of_the_functions_begin_as_torchs():
    variants = {scheme.function: FAMILY[scheme.variant_of] for scheme in FAMILY.values() if scheme.variant_of}
    for name in anynorm.functional.__all__:
        if name in variants:  # as the norm that it is a variant of, and keywords of its own
            own = list(inspect.signature(getattr(anynorm.functional, name)).parameters.values())
            base = list(inspect.signature(getattr(anynorm.functional, variants[name].function)).parameters.values())
            assert [p for p in own if p.name in {p.name for p in base}] == base
            continue
        ours = inspect.signature(getattr(anynorm.functional, name)).parameters.values()
        theirs = inspect.signature(getattr(F, name)).parameters.values()
        added = [(p.name, p.default) for p in ours if p.kind is p.KEYWORD_ONLY]
        assert added == [("activation", None), ("residual", None), ("mask", None), ("lengths", None)]
        same = [(p.name, p.default, p.kind) for p in ours if p.kind is not p.KEYWORD_ONLY]
        assert same == [(p.name, p.default, p.kind) for p in theirs]
