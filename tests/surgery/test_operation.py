"""What every operation shares: the proof on an example, the way back, refusals."""

import copy

import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm.surgery.differences import measure
from anynorm.surgery.operation import NotProved, Options, Snapshot, operate, replace_everywhere, select


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def scale(factor):
    def plan(model, report):
        def change():
            model[4].weight.data.mul_(factor)
            model[0] = nn.Sequential(model[0])
            model[1].training = False
            model[1].weight.requires_grad_(False)
            model.extra = 3

        return change

    return plan


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_what_changed_is_measured_in_evaluation():
    model = network()
    before = copy.deepcopy(model).eval()(X)
    report = operate("scale", model, scale(1.5), Options(example=X, per_layer=True))
    (difference,) = report.differences
    gap = (model.eval()(X) - before).abs()
    assert difference.name == "output"
    assert difference.largest == pytest.approx(float(gap.max().detach()))
    assert difference.mean == pytest.approx(float(gap.mean().detach()))
    assert difference.scale == pytest.approx(float(before.abs().max().detach()))
    assert [layer.name for layer in report.layers] == ["1", "2", "3", "4"]
    assert [layer.largest for layer in report.layers[:3]] == [0, 0, 0]
    assert "output: largest difference" in str(report)
    assert not model.get_submodule("1")._forward_hooks


def describe(model):
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
        sorted(vars(model)),
    )


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert one[2:] == other[2:]


def test_strict_puts_everything_back_where_outputs_moved():
    model = network()
    handle = model[1].register_forward_hook(lambda *_: None)
    before, first = describe(model), model[0]
    with pytest.raises(NotProved, match=r"scale: .* the model is as it was; pass a larger tolerance") as caught:
        operate("scale", model, scale(1.5), Options(example=X, strict=True))
    assert_same(describe(model), before)
    assert model[0] is first
    assert caught.value.report.differences[0].relative > 0.01
    handle.remove()  # finds the dictionary it was put in
    assert not model[1]._forward_hooks
    operate("scale", model, scale(1.5), Options(example=X, strict=True, tolerance=10.0))
    assert isinstance(model[0], nn.Sequential)


def test_whatever_a_change_raises_nothing_is_changed():
    def plan(model, report):
        def change():
            model[1] = nn.Identity()
            raise RuntimeError("halfway")

        return change

    model = network()
    before = describe(model)
    with pytest.raises(RuntimeError, match="halfway"):
        operate("break", model, plan, Options())
    assert_same(describe(model), before)


def test_a_copy_leaves_the_model_alone():
    model = network()
    before = describe(model)
    report = anynorm.accelerate(model, copy=True, example=X, strict=True)
    assert_same(describe(model), before)
    assert type(report.model[1]) is anynorm.BatchNorm2d
    assert report.model[0].weight is not model[0].weight


def test_the_run_of_the_example_changes_nothing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.drop = nn.Dropout()

        def train(self, mode=True):
            raise AssertionError("its own train may do more")

        def forward(self, x, *, factor):
            return {"y": self.drop(self.norm(x)) * factor, "pair": (x, [x + torch.rand(())])}

    model = Counting()
    modes, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    report = anynorm.accelerate(model, example={"x": X, "factor": 2.0}, strict=True)
    assert [d.name for d in report.differences] == ["output['y']", "output['pair'][0]", "output['pair'][1][0]"]
    assert torch.equal(torch.get_rng_state(), modes)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert model.training
    assert model.norm.training


def test_differences_of_special_values():
    inf, nan = float("inf"), float("nan")
    t = torch.tensor
    assert measure(t([inf, nan, 1.0]), t([inf, nan, 1.5])).largest == 0.5
    assert measure(t([1.0]), t([nan])).largest == inf
    assert measure(t([1.0]), t([1.0, 2.0])).largest == inf
    assert measure(None, t([1.0])).largest == inf
    assert measure(t([1, 3]), t([1, 5])).relative == pytest.approx(2 / 3)
    assert measure(t([1j]), t([0j])).largest == 1.0
    assert measure(torch.empty(0), torch.empty(0)).largest == 0.0
    assert measure(t([0.0]), t([0.0])).is_within(None)
    assert not measure(t([1.0]), t([1.0 + 2e-5])).is_within(None)
    assert measure(t([1.0]), t([1.0 + 2e-5])).is_within(1e-4)
    assert not measure(t([1]), t([2])).is_within(None)


@pytest.mark.parametrize("option", ["strict", "per_layer"])
def test_a_comparison_needs_an_example(option):
    with pytest.raises(anynorm.UserError, match=f"{option}=True compares outputs; got no example"):
        anynorm.accelerate(network(), **{option: True})


def test_models_that_no_operation_takes():
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch\.nn\.Module; got int"):
        anynorm.accelerate(3)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(anynorm.UserError, match="before it is scripted"):
        anynorm.accelerate(scripted)
    wrapped = nn.DataParallel(network())
    with pytest.raises(anynorm.UserError, match=r"keeps books; got DataParallel; call it on .*model\.module"):
        operate("freeze", wrapped, scale(1), Options(), wrapped="it keeps books")
    model = network()
    model.lock = __import__("threading").Lock()
    with pytest.raises(anynorm.UserError, match="needs a model that can be copied"):
        anynorm.accelerate(model, copy=True)


def test_selecting_by_name_class_and_function():
    model = nn.Sequential(network(), network())
    model.add_module("again", model[0][1])

    def names(where):
        chosen = select("freeze", model, where)
        return [name for name, module in model.named_modules() if chosen(name, module)]

    assert len(names(None)) == 13
    assert names("1.1") == ["1.1"]
    assert names("1") == ["1", "1.0", "1.1", "1.2", "1.3", "1.4"]  # a container with all that is inside
    assert names("again") == ["0.1"]  # a shared module by any of its names
    assert names(nn.BatchNorm2d) == ["0.1", "1.1"]
    assert names(("1.*", nn.ReLU)) == ["0.2", "1.0", "1.1", "1.2", "1.3", "1.4"]
    assert names(lambda name, module: name.endswith("4")) == ["0.4", "1.4"]
    with pytest.raises(anynorm.UserError, match=r"where='layer4' names no module; the model has 0, 0\.0"):
        select("freeze", model, "layer4")
    with pytest.raises(TypeError, match="where must be names, classes or a function"):
        select("freeze", model, 3)
    with pytest.raises(TypeError, match=r"where must be .*; got BatchNorm2d"):
        select("freeze", model, model[0][1])
    with pytest.raises(TypeError, match="where may name strings and classes; got 3"):
        select("freeze", model, ("1.1", 3))


def test_replacing_at_every_place():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.ReLU())})
    new = nn.Identity()
    replace_everywhere(model, norm, new)
    assert model["a"] is new
    assert model["b"][0] is new


def test_a_snapshot_remembers_the_values_of_shared_tensors():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = one.weight
    model = nn.Sequential(one, two)
    value = one.weight.detach().clone()
    snapshot = Snapshot(model, values=True)
    two.weight = nn.Parameter(torch.zeros(2, 2))
    one.weight.data.zero_()
    snapshot.restore()
    assert two.weight is one.weight
    assert torch.equal(one.weight, value)


def test_running_the_example_moves_no_averages_of_norms_that_are_normalized_by_them():
    model = network()
    anynorm.freeze(model, updates=False)
    before = describe(model)
    for _ in range(2):
        operate("scale", model, scale(1.0), Options(copy=True, example=X))
        anynorm.convert(model, "group", copy=True, example=X)
        anynorm.fold(model, copy=True, example=X)
    assert_same(describe(model), before)
    model(X)
    assert model[1].num_batches_tracked == 1


class Returning(nn.Module):
    def __init__(self, change, before=lambda x: x):
        super().__init__()
        self.inner, self.change, self.before = network(), change, before

    def forward(self, x):
        return self.change(self.inner(self.before(x)))


def test_a_model_that_writes_in_the_example_gets_the_same_twice():
    x = X.clone()
    model = Returning(lambda y: y, before=lambda x: x.sub_(1.0)).eval()
    assert len(anynorm.fold(model, example={"x": x}, strict=True).changed) == 1
    assert torch.equal(x, X)


def test_complex_outputs_may_be_rounded_too():
    model = Returning(torch.fft.fft).eval()
    report = anynorm.fold(model, example=X, strict=True)
    assert report.differences[0].dtype is torch.complex64


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_outputs_that_are_nested(layout):
    report = anynorm.freeze(Returning(lambda y: torch.nested.as_nested_tensor([*y], layout=layout)), example=X)
    assert report.differences[0].largest < 1e-5


def test_what_proves_nothing_is_no_proof():
    model = Returning(lambda y: {y})
    with pytest.raises(ValueError, match="convert: strict=True compares outputs; the model returned no tensor"):
        anynorm.convert(model, "group", example=X, strict=True)
    assert type(model.inner[1]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="got outputs on the meta device; leave example out"):
        anynorm.freeze(network().to("meta"), example=X.to("meta"))


class Listed(nn.Module):
    """Its forward calls a norm that torch does not know to be there."""

    def __init__(self, hold):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.held = hold(self.bn)

    def forward(self, x):
        held = self.held["a"][0] if isinstance(self.held, dict) else self.held
        return held(self.conv(x))


@pytest.mark.parametrize("hold", [lambda bn: {"a": [bn]}, lambda bn: bn.forward], ids=["list", "method"])
@pytest.mark.parametrize("change", [anynorm.fold, lambda model: anynorm.convert(model, "group")], ids=["fold", "group"])
def test_a_norm_that_a_list_holds_too_is_not_replaced(hold, change):
    model = Listed(hold)
    model(X * 3 + 1)
    before = model.eval()(X)
    (left,) = change(model).left
    assert left.reason.startswith("held holds it too, past torch's registry")
    assert torch.equal(model(X), before)
