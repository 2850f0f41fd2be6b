"""Healthy models in PyTorch's usual style, trained briefly: `diagnose` should find nothing wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import anynorm
from anynorm.apps.studies.data import load_data
from doctor.patients import Patient, train


class Block(nn.Module):
    """Of a residual network: two convolutions, and a shortcut with one where sizes change."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


def make_resnet(widths: tuple[int, ...] = (8, 16, 32), depth: int = 1) -> nn.Module:
    """A residual network for images of 8x8; (64, 128, 256, 512) and 2 are ResNet-18 but for its first layers."""
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    channels = widths[0]
    for place, width in enumerate(widths):
        for each in range(depth):
            layers.append(Block(channels, width, 2 if place and not each else 1))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Inverted(nn.Module):
    """Of MobileNetV2."""

    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)]
        layers += [nn.ReLU6(inplace=True), nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


# Expansion, channels, blocks, and the stride of the first: table 2 of the paper, with fewer strides for small images.
MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1),
)  # fmt: skip
SMALL = ((1, 8, 1, 1), (4, 16, 2, 2), (4, 24, 1, 2))


def make_mobilenet(plan: tuple[tuple[int, int, int, int], ...] = SMALL, wide: int = 64) -> nn.Module:
    """A MobileNetV2, small unless the plan says otherwise."""
    channels = plan[0][1] * 2
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)]
    layers.append(nn.ReLU6(inplace=True))
    for expand, out, blocks, stride in plan:
        for each in range(blocks):
            layers.append(Inverted(channels, out, 1 if each else stride, expand))
            channels = out
    layers += [nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(wide, 10))


class Transformer(nn.Module):
    """An encoder over the rows of images, or over tokens of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.places = nn.Parameter(0.02 * torch.randn(1, 8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.squeeze(1)) + self.places).mean(1))


class Double(nn.Sequential):
    """Two convolutions of a U-Net, with their batch norms."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(
            nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """Two steps down and two up, with two classes for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Double(1, 8), Double(8, 16), Double(16, 32)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.back2, self.back1 = Double(32, 16), Double(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x)
        two = self.second(self.pool(one))
        three = self.third(self.pool(two))
        two = self.back2(torch.cat((two, self.up2(three)), 1))
        return self.head(self.back1(torch.cat((one, self.up1(two)), 1)))


class Reader(nn.Module):
    """An LSTM over the rows of images, or over waves; its last state is classified."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.lstm = anynorm.LSTM(8, 32, batch_first=True) if ours else nn.LSTM(8, 32, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lstm(x.squeeze(1))[0][:, -1]))


class Convolutional1d(nn.Sequential):
    """A classifier of sequences with batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(8, 32, 3, padding=1, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Conv1d(32, 32, 3, padding=1, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.squeeze(1))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "resnet": make_resnet,
    "mobilenet": make_mobilenet,
    "transformer": Transformer,
    "unet": UNet,
    "lstm": lambda: Reader(False),
    "our lstm": lambda: Reader(True),
    "conv1d": Convolutional1d,
}


# Of full width and depth, for images of 8x8; only `make ward` takes the minutes that these need.
LARGE: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: make_resnet((64, 128, 256, 512), 2),
    "mobilenet_v2": lambda: make_mobilenet(MOBILENET_V2, 1280),
}


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8), standardized, and their digits."""
    return load_data("digits").tensors("train")


def make_healthy(name: str, seed: int, steps: int = 80, size: int = 64) -> Patient:
    """A model by its name, trained with a seed."""
    torch.manual_seed(seed)
    x, y = load_digits()
    if name == "unet":
        y = (x[:, 0] > 0).long()
    loader = DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True, drop_last=True)
    model = (MAKERS | LARGE)[name]()
    decay = 1e-4
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(anynorm.param_groups(model, decay), lr=0.05, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(anynorm.param_groups(model, decay), lr=3e-3)
    # Weights that move fast leave the averages behind: at a constant rate a full MobileNetV2 has an accuracy of
    # 0.77 in evaluation and is not healthy.
    for factor in (1, 0.5, 0.4, 0.25):
        for group in optimizer.param_groups:
            group["lr"] *= factor
        train(model, loader, optimizer, F.cross_entropy, steps // 4)
    return Patient(model, loader, optimizer, F.cross_entropy)
