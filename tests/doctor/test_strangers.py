"""Models and data that nobody expected: no crash but a clear error, and nothing of the model changes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, TensorDataset

import anynorm
from anynorm.doctor import check
from doctor.patients import make_blobs, make_mlp
from doctor.state import State

pytestmark = pytest.mark.usefixtures("one_thread")


class Calls(nn.Module):
    """A model by a function."""

    def __init__(self, function, *parts):
        super().__init__()
        self.parts, self.function = nn.ModuleList(parts), function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class BadTraining(nn.Module):
    """Cannot be called in training."""

    def __init__(self):
        super().__init__()
        self.inside = make_mlp()

    def forward(self, x):
        y = self.inside(x)
        if self.training:
            raise RuntimeError("not in training\x1b[31m")
        return y


def raise_in_the_middle(model, x):
    model.calls = getattr(model, "calls", 0) + 1
    if model.calls % 3 == 0:
        raise KeyError("the middle")
    return model.parts[0](x)


def change_itself(model, x):
    """Moves its attributes, its buffers and the generators with every call."""
    model.seen = torch.rand(3)
    model.parts[0].anything = object()
    model.parts[0].running_mean.add_(1)
    model.parts[0].register_forward_hook(lambda *_: None)
    return model.parts[0](x + torch.randn_like(x))


def batches(count=3, size=8):
    torch.manual_seed(0)
    return [make_blobs(size) for _ in range(count)]


def examine(model, loader=None, optimizer=None, loss_fn=None, **options):
    """Diagnose, and see that nothing changed; printing and JSON must work too."""
    before = State(model, optimizer if isinstance(optimizer, torch.optim.Optimizer) else None)
    try:
        found = anynorm.diagnose(model, loader, optimizer, loss_fn, **options)
    finally:
        before.check()
    assert str(found) and found.to_json()
    return found


def trained_bn(dtype=torch.float32):
    return make_mlp().to(dtype)


def spoil_weights(model):
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    return model


def set_counter(model):
    model[1].num_batches_tracked = None
    return model


X, Y = make_blobs(32)
MODELS = {
    "no norms": (nn.Sequential(nn.Linear(8, 4)), batches()),
    "no parameters": (nn.ReLU(), batches()),
    "a norm": (nn.BatchNorm1d(8), batches()),
    "a norm without averages": (nn.BatchNorm1d(8, track_running_stats=False), batches()),
    "a layer norm": (nn.LayerNorm(8), batches()),
    "NaN weights": (spoil_weights(make_mlp()), batches()),
    "NaN data": (make_mlp(), [(torch.full((4, 8), float("nan")), torch.zeros(4).long())] * 3),
    "lazy layers": (nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), None),
    "meta": (make_mlp().to("meta"), batches()),
    "meta without data": (make_mlp().to("meta"), None),
    "half": (make_mlp().half(), [(x.half(), y) for x, y in batches()]),
    "bfloat16": (make_mlp().bfloat16(), [(x.bfloat16(), y) for x, y in batches()]),
    "double": (make_mlp().double(), [(x.double(), y) for x, y in batches()]),
    "a batch of one": (make_mlp(), batches(3, 1)),
    "batches of one and two": (make_mlp(), [*batches(1, 1), *batches(2, 2)]),
    "an empty batch": (make_mlp(), [(torch.zeros(0, 8), torch.zeros(0).long()), *batches()]),
    "only empty batches": (make_mlp(), [(torch.zeros(0, 8), torch.zeros(0).long())] * 2),
    "tensors": (make_mlp(), [x for x, _ in batches()]),
    "lists": (make_mlp(), [[x, y] for x, y in batches()]),
    "an empty tuple": (make_mlp(), [()]),
    "a string": (make_mlp(), ["abc", "def"]),
    "None": (make_mlp(), [None]),
    "dicts": (
        Calls(lambda m, x, labels=None: m.parts[0](x), make_mlp()),
        [{"x": x, "labels": y} for x, y in batches()],
    ),
    "dicts that do not fit": (make_mlp(), [{"x": x} for x, _ in batches()]),
    "packed sequences": (
        Calls(lambda m, x: m.parts[1](m.parts[0](x)[1][0][0]), nn.LSTM(8, 16), nn.BatchNorm1d(16)),
        [pack_sequence([torch.randn(3, 8), torch.randn(2, 8)]) for _ in range(3)],
    ),
    "float targets": (make_mlp(), [(x, torch.randn(8, 4)) for x, _ in batches()]),
    "targets out of range": (make_mlp(), [(x, y + 99) for x, y in batches()]),
    "targets that are no tensors": (make_mlp(), [(x, ["a"] * 8) for x, _ in batches()]),
    "targets of -100": (make_mlp(), [(x, torch.full_like(y, -100)) for x, y in batches()]),
    "integers": (Calls(lambda m, x: m.parts[1](m.parts[0](x)), nn.Embedding(9, 8), make_mlp()), [torch.arange(8)] * 3),
    "shapes that change": (
        nn.Sequential(nn.Conv1d(8, 4, 1), nn.BatchNorm1d(4)),
        [torch.randn(4, 8, n) for n in (3, 5, 9)],
    ),
    "outputs in a dict": (Calls(lambda m, x: {"a": m.parts[0](x), "b": "text"}, make_mlp()), batches()),
    "outputs of nothing": (Calls(lambda m, x: None, make_mlp()), batches()),
    "fails in training": (BadTraining(), batches()),
    "fails in the middle": (Calls(raise_in_the_middle, make_mlp()), batches(6)),
    "fails always": (Calls(lambda m, x: 1 / 0, make_mlp()), batches()),
    "changes itself": (Calls(change_itself, nn.BatchNorm1d(8)), batches()),
    "a wrong number of features": (nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(5)), batches()),
    "without a counter": (set_counter(make_mlp()), batches()),
    "complex": (nn.Sequential(nn.BatchNorm1d(8)), [torch.randn(4, 8, dtype=torch.complex64)] * 2),
    "sparse": (nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), [torch.eye(8).to_sparse()] * 2),
    "no features": (nn.Sequential(nn.BatchNorm1d(0)), [torch.zeros(4, 0)] * 2),
    "a model in evaluation": (make_mlp().eval(), batches()),
    "data parallel": (nn.DataParallel(make_mlp()), batches()),
    "compiled": (torch.compile(make_mlp(), backend="eager"), batches()),
    "a scripted part": (nn.Sequential(torch.jit.script(make_mlp()), nn.BatchNorm1d(4)), batches()),
    "accelerated": (anynorm.accelerate(make_mlp()).model, batches()),
    "frozen": (anynorm.freeze(make_mlp()).model, batches()),
    "fused": (anynorm.accelerate(make_mlp(), fuse=True).model, batches()),
    "of domains": (
        Calls(
            lambda m, x: m.parts[1](m.parts[0](x)), nn.Linear(8, 8), anynorm.DomainBatchNorm1d(8, domains=["a", "b"])
        ),
        batches(),
    ),
    "inference buffers": (make_mlp(), batches()),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_strange_model_or_batch_is_looked_at_without_a_crash(name):
    model, loader = MODELS[name]
    found = examine(model, loader)
    assert found.checked


@pytest.mark.parametrize("name", [name for name, (_, loader) in MODELS.items() if loader is not None])
def test_repairs_of_strange_models_work_or_say_why_not(name):
    import copy

    model, loader = MODELS[name]
    try:
        model = copy.deepcopy(model)
    except Exception:
        pytest.skip("cannot be copied")
    for finding in anynorm.diagnose(model, loader).findings:
        if finding.repair is not None:
            before = State(model)
            try:
                finding.apply()
            except Exception:  # what the model itself raises is passed on
                before.check()


def test_a_script_module_is_refused():
    with pytest.raises(anynorm.UserError, match="script has compiled"):
        anynorm.diagnose(torch.jit.script(make_mlp()))


@pytest.mark.parametrize("wrong", [None, 3, "model", nn.BatchNorm1d])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(TypeError, match="model must be a"):
        anynorm.diagnose(wrong)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"checks": ["unknown"]}, anynorm.UserError, "checks must be known"),
        ({"checks": [3]}, anynorm.UserError, "checks must be known"),
        ({"checks": 3}, TypeError, "checks"),
        ({"batches": 0}, anynorm.UserError, "batches must be"),
        ({"batches": "all"}, anynorm.UserError, "batches must be"),
        ({"loader": 3}, TypeError, "loader must give batches"),
        ({"loader": []}, anynorm.UserError, "at least 1 batch"),
        ({"optimizer": "sgd"}, TypeError, "optimizer"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn"),
        ({"forward_fn": 3}, TypeError, "forward_fn"),
    ],
)
def test_wrong_arguments_are_refused(options, error, said):
    options = {"loader": batches(), **options}
    with pytest.raises(error, match=said):
        examine(make_mlp(), **options)


def test_lazy_modules_must_have_seen_an_input():
    model = nn.Sequential(nn.Linear(8, 4), nn.LazyBatchNorm1d())
    with pytest.raises(anynorm.UserError, match="lazy modules must have seen"):
        examine(model, batches())


def give(count):
    yield from batches(count)


class Endless:
    """Gives batches without end, and draws from the generators."""

    def __iter__(self):
        while True:
            yield torch.randn(8, 8)


class Indexed:
    """Has no `__iter__`."""

    def __getitem__(self, place):
        return batches(5)[place]


@pytest.mark.parametrize(
    "loader", [give(3), Endless(), Indexed(), DataLoader(TensorDataset(X, Y), 8, shuffle=True), iter(batches()), (X,)]
)
def test_anything_that_gives_batches_is_a_loader(loader):
    assert examine(make_mlp(), loader).measured["batches"] in (1, 3, 4, 5, 16)


def raises_midway():
    yield batches(1)[0]
    raise OSError("the disk")


def test_what_a_loader_raises_is_passed_on():
    with pytest.raises(OSError, match="the disk"):
        examine(make_mlp(), raises_midway())


@pytest.mark.parametrize("kind", ["never", "after an iteration"])
def test_nothing_changes_where_a_check_raises(monkeypatch, kind):
    class Broken(check.Check):
        id, title, fault, evidence, cure = "broken", "", "", "", ""
        needs = "data"

        def run(self, facts):
            assert facts.training.seen
            if kind == "after an iteration":
                yield self.find("1", "something")
            facts.model.eval()
            facts.model[1].running_mean.add_(1)
            torch.rand(1)
            raise ZeroDivisionError("broken")

    known = {**check.find_checks(), "broken": Broken()}
    monkeypatch.setattr("anynorm.doctor.diagnose.find_checks", lambda: known)
    model = make_mlp().train()
    with pytest.raises(ZeroDivisionError):
        examine(model, batches(), checks=["broken"])


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda y, t: F.cross_entropy(y, t, reduction="none"),
        lambda y, t: float(F.cross_entropy(y, t)),
        lambda y, t: None,
        lambda y, t: {"loss": 3},
        lambda y, t: 1 / 0,
        lambda y, t: torch.tensor(float("nan")),
        lambda y, t: F.cross_entropy(y, t) * 1j,
        nn.CrossEntropyLoss(),
    ],
)
def test_a_loss_of_any_kind(loss_fn):
    examine(make_mlp(), batches(), loss_fn=loss_fn)


def test_forward_fn_calls_the_model():
    model = Calls(lambda m, x, scale: m.parts[0](x) * scale, make_mlp())
    found = examine(model, batches(), forward_fn=lambda model, batch: model(batch[0], scale=2.0))
    assert "training problem" not in found.measured
    assert found.measured["evaluation loss"] > 0


def test_distributed_data_parallel_of_one_process():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(make_mlp())
        assert examine(model, batches()).checked
    finally:
        dist.destroy_process_group()


def test_names_and_classes_of_any_length():
    model = nn.Module()
    deep = model
    for _ in range(60):
        deep.add_module("x" * 300, nn.Module())
        deep = deep._modules["x" * 300]
    norm = type("Norm" + "y" * 5000, (nn.BatchNorm1d,), {})
    deep.add_module("<script>\x1b[31m\n", norm(4, momentum=0.99))
    found = examine(model)
    assert [finding.check for finding in found.findings if finding.severity == "error"] == ["momentum-inverted"]
    found.findings[0].apply()


def test_an_optimizer_of_any_kind():
    model = make_mlp()
    y = model(X)
    F.cross_entropy(y, Y).backward()
    for kind in (torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.LBFGS):
        optimizer = kind(model.parameters())
        if kind is not torch.optim.LBFGS:
            optimizer.step()
        examine(model, batches(), optimizer)
