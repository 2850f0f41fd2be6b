"""A network with norms of its own, as `anynorm try` takes it: each norm is replaced, and nothing else."""

import numpy as np
import pytest
import torch
from torch import nn

from anynorm.apps.studies.models import NotBuilt, build, find_model, takes_norm
from anynorm.apps.studies.norms import NORMS, CannotNormalize, find_arm
from anynorm.apps.studies.replace import find_input_shapes, replace_norms

SHAPE = (3, 8, 8)
NETWORKS = """
import torch
from torch import nn

def images():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.5), nn.ReLU(), nn.GroupNorm(4, 8),
        nn.InstanceNorm2d(8, affine=True), nn.Flatten(), nn.Linear(288, 6), nn.LayerNorm(6), nn.Linear(6, 4),
    )

def with_example(width=6):
    return images(), torch.randn(2, 3, 8, 8)

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))

network = plain()  # which draws, when the module is imported
"""


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(NETWORKS)


def make(norm, name="images"):
    torch.manual_seed(3)
    return build(f"own.py:{name}", NORMS[norm], SHAPE, 4)


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group", "rms"])
def test_every_norm_is_replaced_and_the_weights_are_the_same(norm):
    network, own = make(norm), make("none")
    norms = [network[place] for place in (1, 3, 4, 7)]
    kinds = ["batch", "group", "instance", "layer"]
    for module, kind in zip(norms, kinds, strict=True):
        assert find_arm(module) == ("" if kind == norm else norm)
    assert network(torch.randn(5, *SHAPE)).shape == (5, 4)
    assert network.training
    for place in (0, 6, 8):
        assert torch.equal(network[place].weight, own[place].weight)


def test_a_norm_of_the_kind_that_is_compared_stays_as_its_author_made_it():
    assert (type(make("batch")[1]), make("batch")[1].eps) == (nn.BatchNorm2d, 0.5)
    assert make("group")[3].num_groups == 4
    with pytest.raises(CannotNormalize, match="one value in each group"):
        make("instance")  # its layer norm goes over (N, 6)


def test_what_a_factory_returns_and_takes():
    assert isinstance(make("batch", "with_example"), nn.Sequential)
    assert takes_norm(lambda norm: None)
    assert takes_norm(lambda norm=None: None)
    assert takes_norm(lambda make: None)
    assert not takes_norm(lambda width=4: None)
    assert not takes_norm(lambda *layers, **options: None)
    assert "its own stays" in find_model("own.py:images", SHAPE, 4).about


@pytest.mark.parametrize(("name", "said"), [("plain", "runs no norm of torch.nn"), ("lazy", "lazy layers")])
def test_networks_that_cannot_be_compared(name, said):
    with pytest.raises(NotBuilt, match=said):
        make("batch", name)


def test_a_network_is_no_factory():
    with pytest.raises(ValueError, match="every seed starts afresh"):
        make("batch", "network")


class Block(nn.Module):
    """Features last, as in a transformer; one norm in two places, and one that is never run."""

    def __init__(self):
        super().__init__()
        self.norm, self.unused = nn.LayerNorm(6), nn.LayerNorm(6)
        self.again = self.norm
        with torch.no_grad():
            self.norm.weight.copy_(torch.arange(1.0, 7.0))

    def forward(self, x):
        return self.again(self.norm(x))


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_channels_that_come_last_are_those_that_are_normalized(norm):
    network, x = Block(), torch.randn(4, 5, 6)
    names = {name for name in network.state_dict() if "running" not in name and "num_batches" not in name}
    replace_norms(network, NORMS[norm], (x,))
    assert network.norm is network.again
    assert type(network.unused) is nn.LayerNorm
    assert names == {name for name in network.state_dict() if "running" not in name and "num_batches" not in name}
    assert torch.equal(network.norm.weight, torch.arange(1.0, 7.0))
    y = network.norm(x) / network.norm.weight
    assert y.shape == x.shape
    pooled = {"batch": y.reshape(20, 6).T, "instance": y.transpose(1, 2).reshape(24, 5)}.get(
        norm, y.transpose(1, 2).reshape(4 * network.norm.num_groups if norm == "group" else 1, -1)
    )
    assert pooled.mean(1).abs().max() < 1e-5


def test_looking_at_a_network_leaves_it_alone():
    network = make("none", "images")
    batch = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    before = {name: value.clone() for name, value in batch.state_dict().items()}
    random = torch.random.get_rng_state()
    assert list(find_input_shapes(batch, (torch.randn(2, *SHAPE, generator=torch.Generator()),)).values()) == [
        (2, 4, 8, 8)
    ]
    assert all(torch.equal(value, before[name]) for name, value in batch.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(module.training for module in batch.modules())
    assert not batch[1]._forward_pre_hooks
    assert network.training


def test_attention_is_not_computed_with_layer_norm_in_place_of_another(tmp_path):
    """torch's fast path of evaluation takes a norm's weights and computes layer norm, whatever the norm is."""
    (tmp_path / "former.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)\n"
        "    return nn.TransformerEncoder(layer, 1)\n"
    )
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32))
    for norm in ("none", "batch", "layer"):
        torch.manual_seed(0)
        network = build("former.py:make", NORMS[norm], (5, 8), 8, (x,)).eval()
        assert torch.backends.mha.get_fastpath_enabled()  # the process's switch is not ours to turn
        for mask in (None, torch.arange(5)[None] >= torch.tensor([5, 3, 4, 1])[:, None]):
            with torch.no_grad():
                fast = network(x, src_key_padding_mask=mask)
            assert torch.allclose(fast, network(x, src_key_padding_mask=mask).detach(), atol=1e-6)
