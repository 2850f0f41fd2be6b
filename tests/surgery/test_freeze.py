"""Frozen norms stand still, by part, through everything that moves others, and come back as they were."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn

import anynorm
from anynorm.modules.frozen import Frozen

SHAPES = {1: (6, 4, 5), 2: (6, 4, 3, 3), 3: (6, 4, 2, 3, 3)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def train_once(norm, x):
    norm.train()
    for _ in range(2):
        norm(x)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.uniform_(-1, 1)
    return norm


def make(kind, dims):
    norm = kind(4)
    return train_once(norm, draw(*SHAPES[dims]))


KINDS = [
    (getattr(module, f"{name}{dims}d"), dims)
    for module, name in (
        (nn, "BatchNorm"),
        (anynorm, "BatchNorm"),
        (anynorm, "GhostBatchNorm"),
        (anynorm, "BatchRenorm"),
        (anynorm, "BatchNormAct"),
    )
    for dims in (1, 2, 3)
]


def build(kind, dims):
    options = {"ghost_size": 3} if "Ghost" in kind.__name__ else {}
    return train_once(kind(4, **options), draw(*SHAPES[dims]))


def read_state(norm):
    return {name: value.clone() for name, value in norm.state_dict().items()}


def is_same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kind", "dims"), KINDS, ids=lambda value: getattr(value, "__name__", value))
def test_frozen_in_every_part(kind, dims):
    norm = build(kind, dims)
    x = draw(*SHAPES[dims], seed=1)
    expected = copy.deepcopy(norm).eval()(x)
    before, counter = read_state(norm), int(norm.num_batches_tracked)
    model = nn.Sequential(norm)
    report = anynorm.freeze(model, example=x, strict=True)
    assert len(report.changed) == 1
    assert report.differences[0].is_within(None)
    for _ in range(2):
        y = model.train()(x)
        assert torch.allclose(y, expected, atol=1e-6)
    assert is_same(read_state(norm), before)
    assert [p.requires_grad for p in norm.parameters()] == [False, False]
    report = anynorm.unfreeze(model)
    assert type(norm) is kind
    assert norm.training
    assert "frozen" not in vars(norm)
    assert [p.requires_grad for p in norm.parameters()] == [True, True]
    assert int(norm.num_batches_tracked) == counter
    model(x)
    assert int(norm.num_batches_tracked) > counter
    assert not is_same(read_state(norm), before)


def test_the_three_switches_by_themselves():
    x = draw(*SHAPES[2], seed=1)
    trained = make(nn.BatchNorm2d, 2)
    by_batch, by_average = copy.deepcopy(trained).train()(x), copy.deepcopy(trained).eval()(x)
    moved = copy.deepcopy(trained).train()
    moved(x)
    for statistics in (False, True):
        for updates in (False, True):
            for affine in (False, True):
                norm = copy.deepcopy(trained)
                if not (statistics or updates or affine):
                    with pytest.raises(anynorm.UserError, match="must be True; got False for all"):
                        anynorm.freeze(norm, False, False, False)
                    continue
                before = read_state(norm)
                anynorm.freeze(norm, statistics, updates, affine)
                y = norm.train()(x)
                assert torch.allclose(y, by_average if statistics else by_batch, atol=1e-5)
                assert y.requires_grad is not affine
                if updates:
                    assert is_same(read_state(norm), before)
                else:
                    assert int(norm.num_batches_tracked) == 3
                    assert torch.allclose(norm.running_mean, moved.running_mean, atol=1e-6)
                    assert torch.allclose(norm.running_var, moved.running_var, atol=1e-6)
                norm.eval()(x)
                assert int(norm.num_batches_tracked) == (2 if updates else 3)


def test_averages_that_move_while_they_normalize_know_padding():
    """statistics without updates: the moments are of what counts; one value moves nothing."""
    norm, x = make(anynorm.BatchNorm1d, 1), draw(3, 4, 5, seed=2)
    anynorm.freeze(norm, updates=False)
    lengths = torch.tensor([5, 2, 1])
    mean = norm.running_mean.clone()
    with torch.no_grad():
        norm.train()(x, lengths=lengths)
    real = np.concatenate([x[i, :, :n].numpy().astype(np.float64) for i, n in enumerate(lengths.tolist())], axis=1)
    assert np.allclose(norm.running_mean, 0.9 * mean.numpy() + 0.1 * real.mean(1), atol=1e-6)
    assert int(norm.num_batches_tracked) == 3
    norm(x[:1, :, :1])
    assert int(norm.num_batches_tracked) == 3


def test_it_lasts_through_copies_pickles_and_checkpoints():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(nn.BatchNorm2d, 2), nn.Sequential(nn.LayerNorm(3)))
    state = copy.deepcopy(model.state_dict())
    anynorm.freeze(model)
    assert model.state_dict().keys() == state.keys()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        twin.load_state_dict(state)
        before = read_state(twin[1])
        twin.train()(draw(6, 3, 3, 3))
        assert is_same(read_state(twin[1]), before)
        assert not twin[2][0].weight.requires_grad
        report = anynorm.unfreeze(twin)
        assert len(report.changed) == 2
        assert type(twin[1]) is nn.BatchNorm2d
        assert twin[2][0].weight.requires_grad
        twin.train()(draw(6, 3, 3, 3))
        assert not is_same(read_state(twin[1]), before)
    assert isinstance(vars(model[1])["frozen"], Frozen)  # unfreezing copies leaves the model's own


def test_modes_and_wishes_for_gradients_come_back_as_they_were():
    """Modes that differ, parameters that were frozen already, tied ones, and gradients that an optimizer would use."""
    one, two = make(nn.BatchNorm2d, 2), make(anynorm.BatchNorm2d, 2)
    one.eval()
    one.weight.requires_grad_(False)
    two.bias = one.bias
    model = nn.Sequential(one, two)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(draw(*SHAPES[2])).sum().backward()
    optimizer.step()
    anynorm.freeze(model)
    before = read_state(model)
    optimizer.step()
    assert is_same(read_state(model), before)
    anynorm.unfreeze(model)
    assert [p.requires_grad for p in (one.weight, one.bias, two.weight)] == [False, True, True]
    assert not one.training
    assert two.training
    anynorm.freeze(model)
    model.eval()
    anynorm.unfreeze(model)  # the mode that was asked for meanwhile
    assert not two.training


def test_freezing_adds_up():
    norm = make(nn.BatchNorm2d, 2)
    anynorm.freeze(norm, updates=False, affine=False)
    anynorm.freeze(norm, statistics=False, updates=True, affine=False)
    anynorm.freeze(norm, statistics=False, updates=False)
    assert norm.frozen.describe() == "statistics, updates, affine"
    assert "frozen='statistics, updates, affine'" in repr(norm)
    anynorm.unfreeze(norm)
    assert type(norm) is nn.BatchNorm2d
    assert norm.training
    assert norm.weight.requires_grad


def test_what_is_frozen_keeps_nothing_of_its_input():
    norm, x = make(anynorm.BatchNorm2d, 2), draw(*SHAPES[2]).requires_grad_()
    y = norm.eval()(x)
    assert any(t is not None and t.shape == x.shape for t in y.grad_fn.saved_tensors)
    anynorm.freeze(norm)
    y = norm.train()(x)
    assert all(t is None or t.numel() == 4 for t in y.grad_fn.saved_tensors)
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert torch.allclose(found.double(), slope.view(1, 4, 1, 1).expand_as(x), rtol=1e-6)


def test_choosing_norms():
    def network():
        return nn.ModuleDict({f"layer{i}": nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)) for i in (1, 2)})

    def frozen(**options):
        return [entry.name for entry in anynorm.freeze(network(), **options).changed]

    assert frozen() == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert frozen(where="layer1.*") == ["layer1.0", "layer1.1"]
    assert frozen(where=nn.BatchNorm2d) == ["layer1.0", "layer2.0"]
    assert frozen(where=lambda name, norm: not name.startswith("layer2")) == ["layer1.0", "layer1.1"]
    assert frozen(affine=False) == ["layer1.0", "layer2.0"]
    report = anynorm.freeze(network(), affine=False)
    assert {entry.name: entry.reason for entry in report.left} == dict.fromkeys(
        ("layer1.1", "layer2.1"), "it keeps no running averages"
    )
    with pytest.raises(anynorm.UserError, match="where='layer3' names no module"):
        anynorm.freeze(network(), where="layer3")


def test_what_is_left_and_why():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict(
        {
            "own": Own(4),
            "patched": nn.BatchNorm2d(4),
            "plain": nn.BatchNorm2d(4, affine=False, track_running_stats=False),
            "sync": nn.SyncBatchNorm(4),
        }
    )
    model["patched"].forward = lambda x: x
    report = anynorm.freeze(model, updates=False)
    reasons = {entry.name: entry.reason for entry in report.left}
    assert "may have code of its own" in reasons["own"]
    assert "its forward was replaced on the object" in reasons["patched"]
    assert reasons["plain"] == "it keeps no running averages and has no gamma or beta"
    assert reasons["sync"] == "ranks merge statistics in training only; freeze its updates too"
    assert not report.changed
    assert all(p.requires_grad for p in model.parameters())
    report = anynorm.freeze(model)
    assert [entry.name for entry in report.changed] == ["sync"]
    assert torch.equal(model["sync"].train()(torch.ones(2, 4, 1, 1)), model["sync"].eval()(torch.ones(2, 4, 1, 1)))
    anynorm.unfreeze(model)
    assert type(model["sync"]) is nn.SyncBatchNorm


def test_instance_norm_with_averages():
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    x = draw(*SHAPES[2])
    norm(x)
    expected, before = copy.deepcopy(norm).eval()(x), read_state(norm)
    anynorm.freeze(norm)
    assert torch.allclose(norm.train()(x), expected, atol=1e-6)
    assert is_same(read_state(norm), before)
    anynorm.unfreeze(norm)
    anynorm.freeze(norm, statistics=False)
    assert not torch.allclose(norm.train()(x), expected, atol=1e-2)
    assert is_same(read_state(norm), before)
    anynorm.unfreeze(norm)
    report = anynorm.freeze(norm, updates=False)
    assert report.left[0].reason == "only batch norm moves averages by which it normalizes; freeze its updates too"


def test_pattern_and_recurrent_norms():
    norm = anynorm.AnyNorm("n c s -> c", track_running_stats=True, c=4)
    x = draw(*SHAPES[2])
    norm(x)
    expected = copy.deepcopy(norm).eval()(x)
    anynorm.freeze(norm)
    assert torch.allclose(norm.train()(x), expected, atol=1e-6)
    lstm = anynorm.LSTM(4, 3, norm="batch-sequence")
    rows = draw(5, 6, 4)
    lstm.train()(rows)
    before = read_state(lstm)
    expected = copy.deepcopy(lstm).eval()(rows)[0]
    anynorm.freeze(lstm)
    assert torch.allclose(lstm.train()(rows)[0], expected, atol=1e-6)
    assert is_same(read_state(lstm), before)
    anynorm.unfreeze(lstm)
    lstm.train()(rows)
    assert not is_same(read_state(lstm), before)


def test_beside_the_other_operations():
    """accelerate, fuse, sync and recalibrate before and after; what would end the freezing in silence is left."""
    x = draw(6, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model(x)
    anynorm.freeze(model)
    expected = model.train()(x)
    anynorm.sync(model)
    anynorm.sync(model, undo=True)
    before = read_state(model)
    anynorm.accelerate(model, fuse=True)
    assert type(model[1]) is anynorm.BatchNormAct2d
    assert torch.allclose(model.train()(x), expected, atol=1e-6)
    assert is_same(read_state(model), before)
    report = anynorm.accelerate(model, undo=True)
    assert report.left[0].reason == "it is frozen: anynorm.unfreeze(model) comes first"
    with pytest.raises(ValueError, match=r"it is frozen"):
        anynorm.recalibrate(model, [x])
    anynorm.unfreeze(model)
    assert type(model[1]) is anynorm.BatchNormAct2d
    anynorm.accelerate(model, undo=True)
    assert type(model[1]) is nn.BatchNorm2d
    model.train()(x)
    assert not is_same(read_state(model), before)


def test_accumulation_leaves_frozen_norms_alone():
    x = draw(8, 4, seed=3)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    model(x)
    anynorm.freeze(model, affine=False)
    anynorm.accelerate(model)
    before = read_state(model[0])
    whole = model.train()(x).square().mean()
    expected = torch.autograd.grad(whole, list(model.parameters()))
    loss = anynorm.accumulate(model, [x[:4], x[4:]], lambda m, part: m(part).square().mean())
    assert loss is not None
    assert is_same(read_state(model[0]), before)
    found = [p.grad for p in model.parameters()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_data_parallel_is_refused_where_gradients_would_go():
    wrapped = nn.DataParallel(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(
        anynorm.UserError, match=r"freeze: .* keep books .* got DataParallel; call it on the model inside"
    ):
        anynorm.freeze(wrapped)
    assert len(anynorm.freeze(wrapped, affine=False).changed) == 1
    assert len(anynorm.unfreeze(wrapped).changed) == 1


def test_parametrized_gamma():
    model = nn.Sequential(anynorm.BatchNorm2d(4), nn.BatchNorm2d(4))
    for norm in model:
        nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    report = anynorm.freeze(model)
    assert [entry.name for entry in report.changed] == ["0"]
    assert "may have code of its own" in report.left[0].reason
    assert not any(p.requires_grad for p in model[0].parameters())
    before = read_state(model[0])
    model.train()[0](draw(*SHAPES[2]))
    assert is_same(read_state(model[0]), before)
    anynorm.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    anynorm.freeze(model, statistics=False, updates=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_compiled_graphs_see_it():
    model = nn.Sequential(nn.Linear(4, 4), make(anynorm.BatchNorm1d, 1))
    x = draw(6, 4)
    expected = copy.deepcopy(model).eval()(x)
    anynorm.freeze(model)
    before = read_state(model)
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6)
    assert is_same(read_state(model), before)


def test_torchs_norm_with_frozen_gamma_follows_the_mode_also_when_more_is_frozen_or_less():
    model = nn.Sequential(make(nn.BatchNorm2d, 2))
    anynorm.freeze(model.train(), statistics=False, updates=False)
    assert type(model[0]) is nn.BatchNorm2d
    anynorm.freeze(model.eval(), statistics=False)
    assert not model[0].training
    anynorm.unfreeze(model)
    assert not model[0].training
    anynorm.freeze(model, statistics=False, updates=False)
    anynorm.unfreeze(model.train())
    assert model[0].training


def test_a_gamma_that_two_norms_share_wants_its_gradient_again_whichever_was_frozen_first():
    model = nn.Sequential(make(nn.BatchNorm2d, 2), make(nn.BatchNorm2d, 2))
    model[1].weight = model[0].weight
    anynorm.freeze(model, where="0")
    anynorm.freeze(model, where="1")
    anynorm.unfreeze(model)
    assert model[0].weight.requires_grad


def test_gamma_is_frozen_by_whatever_name_it_has():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return nn.functional.layer_norm(x, (4,), self.scale, self.shift)

    scaled = Scaled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        split = nn.utils.weight_norm(make(nn.BatchNorm2d, 2))  # weight_g and weight_v
    anynorm.register(Scaled, "layer", weight="scale", bias="shift", eps=1e-5)
    model = nn.ModuleList([scaled, split])
    for _ in range(2):  # as it is, and accelerated
        assert len(anynorm.freeze(model).changed) == 2
        assert not any(p.requires_grad for p in model.parameters())
        anynorm.unfreeze(model)
        assert all(p.requires_grad for p in model.parameters())
        anynorm.accelerate(model)


class Subclass(nn.BatchNorm2d):
    pass


def test_a_frozen_norm_of_another_class_is_pickled_and_is_its_class_again_when_it_is_unfrozen():
    model = nn.Sequential(train_once(Subclass(4), draw(*SHAPES[2])))
    anynorm.freeze(model)
    back = pickle.loads(pickle.dumps(model))
    before = read_state(back)
    back.train()(draw(*SHAPES[2]))
    assert is_same(read_state(back), before)
    for each in (model, back, copy.deepcopy(model)):
        anynorm.unfreeze(each)
        assert type(each[0]) is Subclass


@pytest.mark.parametrize("again", [anynorm.freeze, anynorm.accelerate])
def test_what_is_rolled_back_has_its_gradients_and_the_way_back(again):
    x = draw(*SHAPES[2])
    model = nn.Sequential(make(nn.BatchNorm2d, 2), nn.ReLU())
    model(x).sum().backward()
    gradient = model[0].weight.grad
    if again is anynorm.accelerate:
        anynorm.freeze(model, affine=False)
    with pytest.raises(anynorm.NotProved):
        again(model, example=x, strict=True, tolerance=-1)
    anynorm.unfreeze(model)
    assert model[0].weight.grad is gradient
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_averages_that_are_frozen_are_not_reset(kind, dims):
    model, x = nn.Sequential(build(kind, dims)), draw(*SHAPES[dims], seed=3)
    anynorm.freeze(model)
    before = read_state(model)
    torch.optim.swa_utils.update_bn([x], model)
    assert is_same(read_state(model), before)
    anynorm.unfreeze(model)
    model[0].reset_running_stats()
    assert model[0].num_batches_tracked == 0


def test_averages_that_follow_pass_over_batches_that_are_not_finite_where_the_norm_does():
    model = nn.Sequential(train_once(anynorm.BatchNorm2d(4, on_nonfinite="skip"), draw(*SHAPES[2])))
    anynorm.freeze(model, updates=False)
    before = read_state(model)
    with pytest.warns(UserWarning, match="not counted in the running averages"):
        model(torch.full(SHAPES[2], torch.nan))
    assert is_same(read_state(model), before)
    assert model[0].nonfinite_batches == 1


def test_norms_with_averages_for_each_domain():
    model = nn.Sequential(anynorm.DomainBatchNorm2d(4, domains=("day", "night"), shared_affine=False))
    anynorm.freeze(model)
    before = read_state(model)
    assert not any(p.requires_grad for p in model.parameters())
    with anynorm.domain("night"):
        assert torch.allclose(model.train()(draw(*SHAPES[2])), draw(*SHAPES[2]), atol=1e-4)
    assert is_same(read_state(model), before)
    anynorm.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    for left in (anynorm.fold(model.eval()).left, anynorm.convert(model, "group").left):
        assert left[0].reason == "it has averages for each domain"


@pytest.mark.parametrize("kind", [nn.LazyBatchNorm2d, anynorm.LazyBatchNorm2d])
def test_norms_that_have_not_seen_an_input(kind):
    model = nn.Sequential(kind())
    assert "run one batch first" in anynorm.freeze(model).left[0].reason
    model(draw(*SHAPES[2]))
    assert len(anynorm.freeze(model).changed) == 1
