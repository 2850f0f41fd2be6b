"""param_groups: every parameter once, and which ones are decayed."""

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, parametrize

import anynorm


class PixelNorm(nn.Module):
    """Somebody's norm, of which nothing is known but its name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm((4, 3, 3))
        self.ours = anynorm.GroupNorm(2, 4)
        self.pixel = PixelNorm()
        self.recurrent = anynorm.LSTM(4, 4, norm="layer")


def name_groups(model: nn.Module, **options) -> tuple[set[str], set[str]]:
    """The first names of what is decayed, and of what is not; every parameter that is trained is in one, once."""
    groups = anynorm.param_groups(model, 0.1, **options)
    names = {p: name for name, p in model.named_parameters()}
    flat = [p for group in groups for p in group["params"]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert len(flat) == len(set(flat))
    assert set(flat) == {p for p in model.parameters() if p.requires_grad}
    for group in groups:
        order = [list(names.values()).index(names[p]) for p in group["params"]]
        assert order == sorted(order)
    decayed, others = ({names[p] for p in group["params"]} for group in groups)
    return decayed, others


def test_weights_are_decayed_and_norms_biases_and_scales_are_not():
    decayed, others = name_groups(Block())
    assert decayed == {
        "pos_embed",
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
    }
    # Of three and four axes: the number of axes alone would have them decayed.
    assert {"norm.weight", "norm.bias", "pixel.scale", "ours.weight", "temperature"} <= others


@pytest.mark.parametrize(
    "change", [anynorm.accelerate, lambda m: None, lambda m: anynorm.accelerate(m, undo=True)], ids=["ours", "", "undo"]
)
def test_surgery_changes_no_group(change):
    model = Block()
    before = name_groups(model)
    change(model)
    assert name_groups(model) == before


def test_norms_that_adapters_know():
    """A class under a name that says nothing, with a weight of several axes."""

    class Rescale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + 1e-6) * self.weight

    model = nn.Sequential(Rescale(), nn.Linear(3, 3))
    assert name_groups(model)[0] == {"0.weight", "1.weight"}
    anynorm.register(Rescale, "rms")
    assert name_groups(model)[0] == {"1.weight"}


@pytest.mark.parametrize("order", [1, -1])
def test_a_tied_parameter_is_in_one_group_and_a_norm_anywhere_counts(order):
    norm, other = nn.LayerNorm((4, 4)), nn.Linear(4, 4)
    other.weight = norm.weight
    head, embedding = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
    head.weight = embedding.weight
    model = nn.Sequential(*[norm, other, head, embedding][::order])
    groups = anynorm.param_groups(model, 0.1)
    assert [p is head.weight for p in groups[0]["params"]] == [True]
    assert sum(p is norm.weight for p in groups[1]["params"]) == 1
    name_groups(model)


def test_biases_of_several_axes():
    model = nn.Module()
    model.experts = nn.ParameterDict({"weight": torch.ones(2, 3, 3), "bias": torch.ones(2, 3)})
    assert name_groups(model) == ({"experts.weight"}, {"experts.bias"})


def test_containers_that_call_themselves_norms_are_none():
    class NormMlp(nn.Sequential):
        pass

    decayed, _ = name_groups(NormMlp(nn.LayerNorm(4), nn.Linear(4, 4)))
    assert decayed == {"1.weight"}


def test_parametrized_weights():
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.square()

    norm = nn.LayerNorm((3, 3))
    parametrize.register_parametrization(norm, "weight", Square())
    decayed, others = name_groups(nn.Sequential(norm, parametrizations.spectral_norm(nn.Linear(3, 3))))
    assert decayed == {"1.parametrizations.weight.original"}
    assert "0.parametrizations.weight.original" in others


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    assert name_groups(model) == ({"2.weight"}, {"1.bias", "2.bias"})


def test_no_decay_names_classes_and_functions():
    model = Block()
    plain = name_groups(model)[0]
    for given, gone in (
        ("pos_embed", {"pos_embed"}),
        ({"pos*", "*.in_proj_weight"}, {"pos_embed", "attention.in_proj_weight"}),
        (nn.Embedding, {"embedding.weight"}),
        (("pos_embed", nn.Embedding), {"pos_embed", "embedding.weight"}),
        (lambda name, p: p.dim() == 3, {"pos_embed"}),
        ((), set()),
    ):
        assert name_groups(model, no_decay=given)[0] == plain - gone


def test_optimizers_take_them_and_norms_stay_where_there_is_no_gradient():
    """Decay alone moves the weight, and no norm; also where one group is empty."""
    for model in (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), nn.Sequential(nn.LayerNorm(3))):
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer = kind(anynorm.param_groups(model, weight_decay=0.5), lr=0.1)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
            assert moved == ({"0.weight"} if len(model) == 2 else set())


def test_wrapped_models():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        groups = anynorm.param_groups(wrapped, 0.1)
        assert [len(group["params"]) for group in groups] == [1, 3]


@pytest.mark.parametrize(
    ("make", "options", "kind", "text"),
    [
        (lambda: "model", {}, TypeError, "must be a torch.nn.Module; got str"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, anynorm.UserError, "got 0.weight, .* run one batch first"),
        (Block, {"no_decay": "head.*"}, anynorm.UserError, "'head.\\*' names no parameter; the model has pos_embed"),
        (Block, {"no_decay": nn.Conv2d}, anynorm.UserError, "no module has; got torch.nn.Conv2d"),
        (Block, {"no_decay": 3}, TypeError, "names, classes or a function of .* got int"),
        (Block, {"no_decay": [3]}, TypeError, "names and classes; got 3"),
        (Block, {"weight_decay": -0.1}, anynorm.UserError, "0 or more; got -0.1"),
        (Block, {"weight_decay": float("nan")}, anynorm.UserError, "0 or more; got nan"),
    ],
)
def test_what_is_refused(make, options, kind, text):
    with pytest.raises(kind, match=text):
        anynorm.param_groups(make(), **{"weight_decay": 0.1, **options})


def test_flat_parameters_are_refused():
    """FullyShardedDataParallel flattens all parameters, so that every one would pass for a bias."""
    flat = type("FullyShardedDataParallel", (nn.Sequential,), {})(nn.Linear(3, 3))
    with pytest.raises(anynorm.UserError, match="makes all of them flat; use fully_shard"):
        anynorm.param_groups(flat, 0.1)
