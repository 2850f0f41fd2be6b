"""Small complete models to try things on, each returned with an example input of the right shape."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Model = tuple[nn.Module, Tensor]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm, added to the input (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1: nn.Conv2d = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1: nn.BatchNorm2d = nn.BatchNorm2d(channels)
        self.conv2: nn.Conv2d = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2: nn.BatchNorm2d = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            project = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """ResNet-18 as published: 11,689,512 parameters for 1000 classes, names as in torchvision."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1: nn.Conv2d = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1: nn.BatchNorm2d = nn.BatchNorm2d(64)
        self.layer1: nn.Sequential = self._stage(64, 64, 1)
        self.layer2: nn.Sequential = self._stage(64, 128, 2)
        self.layer3: nn.Sequential = self._stage(128, 256, 2)
        self.layer4: nn.Sequential = self._stage(256, 512, 2)
        self.fc: nn.Linear = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(ResidualBlock(in_channels, channels, stride), ResidualBlock(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        y: Tensor = self.fc(x.mean(dim=(2, 3)))
        return y


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel by itself, narrow again; added to the input where sizes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, widen: int) -> None:
        super().__init__()
        width = in_channels * widen
        layers = [] if widen == 1 else [convolve(in_channels, width, 1)]
        narrow = [nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv: nn.Sequential = nn.Sequential(*layers, convolve(width, width, 3, stride, groups=width), *narrow)
        self.is_residual: bool = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv(x) if self.is_residual else self.conv(x)
        return y


class MobileNetV2(nn.Module):
    """MobileNetV2 as published (arXiv 1801.04381): 3,504,872 parameters for 1000 classes, names as in torchvision."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolve(3, 32, 3, stride=2)]
        source = 32
        for widen, channels, count, stride in self.STAGES:
            for place in range(count):
                layers.append(InvertedResidual(source, channels, stride if place == 0 else 1, widen))
                source = channels
        self.features: nn.Sequential = nn.Sequential(*layers, convolve(source, 1280, 1))
        self.classifier: nn.Sequential = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return y


def convolve(in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution, its batch norm and ReLU6, as MobileNetV2 has them."""
    convolution = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True))


class UNet(nn.Module):
    """A 2-D U-Net of three levels with affine instance norm, as used for medical images.

    Each level holds two 3x3 convolutions; arXiv 1505.04597 gives the shape, 1809.10486 the norm.
    """

    def __init__(self, in_channels: int = 1, channels: int = 16, num_classes: int = 2) -> None:
        super().__init__()
        self.down1: nn.Sequential = self._level(in_channels, channels)
        self.down2: nn.Sequential = self._level(channels, 2 * channels)
        self.bottom: nn.Sequential = self._level(2 * channels, 4 * channels)
        self.widen2: nn.ConvTranspose2d = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.up2: nn.Sequential = self._level(4 * channels, 2 * channels)
        self.widen1: nn.ConvTranspose2d = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.up1: nn.Sequential = self._level(2 * channels, channels)
        self.head: nn.Conv2d = nn.Conv2d(channels, num_classes, 1)

    @staticmethod
    def _level(in_channels: int, channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for source in (in_channels, channels):
            layers += [
                nn.Conv2d(source, channels, 3, padding=1),
                nn.InstanceNorm2d(channels, affine=True),
                nn.LeakyReLU(0.01),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.up2(torch.cat([self.widen2(x), second], dim=1))
        x = self.up1(torch.cat([self.widen1(x), first], dim=1))
        y: Tensor = self.head(x)
        return y


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each normalized first and added to its input (pre-norm)."""

    norm1: nn.Module
    norm2: nn.Module

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv: nn.Linear = nn.Linear(width, 3 * width)
        self.project: nn.Linear = nn.Linear(width, width)
        self.feed_forward: nn.Sequential = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.feed_forward(self.norm2(x))
        return y


class Transformer(nn.Module):
    """A transformer encoder over token numbers (N, L), returning a score per token (N, L, vocabulary)."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        vocabulary: int = 256,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        longest: int = 512,
    ) -> None:
        super().__init__()
        self.embed: nn.Embedding = nn.Embedding(vocabulary, width)
        self.position: nn.Parameter = nn.Parameter(0.02 * torch.randn(longest, width))
        self.blocks: nn.Sequential = nn.Sequential(*(TransformerBlock(width, heads, norm) for _ in range(depth)))
        self.norm: nn.Module = norm(width)
        self.head: nn.Linear = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        y: Tensor = self.head(self.norm(self.blocks(x)))
        return y


class RecurrentNet(nn.Module):
    """An LSTM over (N, L, D): batch norm on its input as (N, D, L), layer norm on its output."""

    def __init__(self, features: int = 40, width: int = 96, num_classes: int = 10) -> None:
        super().__init__()
        self.bn: nn.BatchNorm1d = nn.BatchNorm1d(features)
        self.lstm: nn.LSTM = nn.LSTM(features, width, batch_first=True)
        self.norm: nn.LayerNorm = nn.LayerNorm(width)
        self.head: nn.Linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        y: Tensor = self.head(self.norm(self.lstm(x)[0]))
        return y


def resnet18() -> Model:
    """Return ResNet-18 (20 BatchNorm2d) and 8 images of 3x96x96."""
    return ResNet18(), torch.randn(8, 3, 96, 96)


def mobilenetv2() -> Model:
    """Return MobileNetV2 (52 BatchNorm2d) and 8 images of 3x96x96."""
    return MobileNetV2(), torch.randn(8, 3, 96, 96)


def mlp() -> Model:
    """Return a network of three hidden layers with BatchNorm1d and 128 vectors of 64."""
    layers: list[nn.Module] = []
    for source in (64, 256, 256):
        layers += [nn.Linear(source, 256), nn.BatchNorm1d(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(128, 64)


def unet() -> Model:
    """Return a 2-D U-Net (10 InstanceNorm2d) and 4 images of 1x96x96."""
    return UNet(), torch.randn(4, 1, 96, 96)


def transformer() -> Model:
    """Return a transformer encoder of four blocks (9 LayerNorm) and 8 sequences of 64 tokens."""
    return Transformer(), torch.randint(0, 256, (8, 64))


def transformer_rms() -> Model:
    """Return the same transformer with RMSNorm in place of LayerNorm."""
    return Transformer(norm=nn.RMSNorm), torch.randint(0, 256, (8, 64))


def lstm() -> Model:
    """Return an LSTM with one BatchNorm1d and one LayerNorm and 16 sequences of 50 steps by 40 features."""
    return RecurrentNet(), torch.randn(16, 50, 40)


ZOO: dict[str, Callable[[], Model]] = {
    "resnet18": resnet18,
    "mobilenetv2": mobilenetv2,
    "mlp": mlp,
    "unet": unet,
    "transformer": transformer,
    "transformer-rms": transformer_rms,
    "lstm": lstm,
}
