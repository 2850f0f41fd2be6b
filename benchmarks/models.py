"""The whole models of `make bench`: small enough that a training step takes a fraction of a second on two cores."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from anynorm.apps.zoo import Model, TransformerBlock, lstm, mlp, mobilenetv2, resnet18


class Bottleneck(nn.Module):
    """Narrow by a 1x1 convolution, filter, widen by four; added to the input (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, 4 * channels, 1, bias=False), nn.BatchNorm2d(4 * channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != 4 * channels:
            project = nn.Conv2d(in_channels, 4 * channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 as published, with 25,557,032 parameters for 1000 classes."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        blocks, source = [], 64
        for channels, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for place in range(count):
                blocks.append(Bottleneck(source, channels, stride if place == 0 else 1))
                source = 4 * channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(source, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.fc(self.blocks(x).mean(dim=(2, 3)))


class UNet3d(nn.Module):
    """A 3-D U-Net of three levels with affine instance norm (arXiv 1606.06650; the norm of 1809.10486)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = make_level(1, channels), make_level(channels, 2 * channels)
        self.bottom = make_level(2 * channels, 4 * channels)
        self.widen2 = nn.ConvTranspose3d(4 * channels, 2 * channels, 2, stride=2)
        self.up2 = make_level(4 * channels, 2 * channels)
        self.widen1 = nn.ConvTranspose3d(2 * channels, channels, 2, stride=2)
        self.up1 = make_level(2 * channels, channels)
        self.head = nn.Conv3d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool3d(first, 2))
        x = self.bottom(F.max_pool3d(second, 2))
        x = self.up2(torch.cat([self.widen2(x), second], dim=1))
        return self.head(self.up1(torch.cat([self.widen1(x), first], dim=1)))


def make_level(source: int, channels: int) -> nn.Sequential:
    """Two convolutions, each with instance norm and leaky ReLU."""
    layers: list[nn.Module] = []
    for inputs in (source, channels):
        norm = nn.InstanceNorm3d(channels, affine=True)
        layers += [nn.Conv3d(inputs, channels, 3, padding=1), norm, nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers)


class ViT(nn.Module):
    """A vision transformer of six pre-norm blocks, as wide as ViT-Ti (arXiv 2010.11929, 2012.12877)."""

    def __init__(self, side: int = 96, patch: int = 16, width: int = 192, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, 3, nn.LayerNorm) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def resnet50() -> Model:
    """ResNet-50 (53 BatchNorm2d) and 4 images of 3x96x96."""
    return ResNet50(), torch.randn(4, 3, 96, 96)


def unet3d() -> Model:
    """A 3-D U-Net (10 InstanceNorm3d) and 2 volumes of 32^3."""
    return UNet3d(), torch.randn(2, 1, 32, 32, 32)


def vit() -> Model:
    """A small ViT (13 LayerNorm) and 8 images of 3x96x96."""
    return ViT(), torch.randn(8, 3, 96, 96)


def transformer() -> Model:
    """Four pre-norm blocks (9 LayerNorm) over 8 sequences of 24 positions, 96 wide."""
    blocks = (TransformerBlock(96, 4, nn.LayerNorm) for _ in range(4))
    return nn.Sequential(*blocks, nn.LayerNorm(96)), torch.randn(8, 24, 96)


def mlp_of(batch: int) -> Model:
    """Three hidden layers of 256 (3 BatchNorm1d) and so many vectors of 64."""
    return mlp()[0], torch.randn(batch, 64)


MODELS: dict[str, Callable[[], Model]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenetv2,
    "3-D U-Net": unet3d,
    "ViT, small": vit,
    "LSTM with layer norm": lstm,
    "MLP, batch 16": lambda: mlp_of(16),
    "MLP, batch 96": lambda: mlp_of(96),
    "transformer, pre-norm": transformer,
}
QUICK = ("MobileNetV2", "MLP, batch 16", "transformer, pre-norm")  # of the short run
