"""The built-in models hold the norms they claim, have the published size and accept their own example."""

from collections import Counter

import pytest
import torch
from torch import nn

from anynorm.apps.zoo import ZOO, mobilenetv2, resnet18

NORMS = {
    "resnet18": {"BatchNorm2d": 20},
    "mobilenetv2": {"BatchNorm2d": 52},
    "mlp": {"BatchNorm1d": 3},
    "unet": {"InstanceNorm2d": 10},
    "transformer": {"LayerNorm": 9},
    "transformer-rms": {"RMSNorm": 9},
    "lstm": {"BatchNorm1d": 1, "LayerNorm": 1},
}


def test_every_model_is_listed():
    assert set(ZOO) == set(NORMS)


@pytest.mark.parametrize("name", ZOO)
def test_holds_the_norms_it_claims(name):
    model, _ = ZOO[name]()
    kinds = Counter(type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__)
    assert dict(kinds) == NORMS[name]


@pytest.mark.parametrize("name", [name for name in ZOO if name != "resnet18"])
def test_a_step_reaches_every_parameter(name):
    model, example = ZOO[name]()
    model(example[:2]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_resnet18_is_the_published_one():
    model, _ = resnet18()
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512
    assert [name for name, _ in model.named_parameters()][:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert model.layer2[0].downsample[0].weight.shape == (128, 64, 1, 1)
    assert model.layer2[0].conv1.stride == (2, 2)
    assert model.layer2[0].conv2.stride == (1, 1)
    assert all(conv.bias is None for conv in model.modules() if isinstance(conv, nn.Conv2d))
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("name", ["transformer", "lstm", "unet"])
def test_output_keeps_every_position(name):
    model, example = ZOO[name]()
    with torch.no_grad():
        output = model(example[:2])
    spatial = slice(2, None) if name == "unet" else slice(1, 2)
    assert output.shape[spatial] == example.shape[spatial]


def test_mobilenetv2_is_the_published_one():
    model, _ = mobilenetv2()
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_504_872
    names = [name for name, _ in model.named_parameters()]
    assert names[:2] == ["features.0.0.weight", "features.0.1.weight"]
    assert {"features.1.conv.0.0.weight", "features.2.conv.3.bias", "features.18.1.weight", "classifier.1.bias"} <= set(
        names
    )
    assert model.features[2].conv[1][0].stride == (2, 2)
    assert model.features[2].conv[1][0].groups == 96
    assert [block.is_residual for block in model.features[1:6]] == [False, False, True, False, True]
