"""The cases of `make bench`: layers of networks that people run, fixed before the kernels were tuned.

Shapes are those of the published networks at their published input size. Repeated shapes stand once, and of shapes
that differ little one was taken. Change this file only with a reason that has nothing to do with who wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from anynorm.apps.timing.cases import Case

BATCHES = (1, 8, 32)

# (channels, side) of batch norm at 224x224 pixels: He et al. 2015, table 1 (arXiv 1512.03385).
RESNET50 = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (512, 7), (2048, 7))

# Sandler et al. 2018, table 2 (arXiv 1801.04381): stem, expansions, and a narrow projection.
MOBILENETV2 = ((32, 112), (96, 112), (24, 56), (192, 28), (576, 14), (960, 7))

# (channels, side of a cube) of instance norm at a patch of 128^3 and a batch of 2, as nnU-Net plans for brain tumours
# (Isensee et al. 2021). Its first stage, 32 channels at 128^3, is left out: every tensor there has 537 MB.
NNUNET = ((64, 64), (128, 32), (256, 16), (320, 8))

# (channels, side) of group norm with 32 groups at a latent of 64x64 and a batch of 2, conditioned and not, as in the
# U-Net of Stable Diffusion 1 (Rombach et al. 2022, arXiv 2112.10752); 960 is a skip connection joined on the way up.
DIFFUSION = ((320, 64), (960, 64), (640, 32), (1280, 16), (1280, 8))

# (batch, positions, features): ViT-B/16 (arXiv 2010.11929), and a language model as wide as LLaMA 7B
# (arXiv 2302.13971): one token, a prompt, two long ones.
VIT = ((1, 197, 768), (8, 197, 768), (32, 197, 768))
LANGUAGE = ((1, 1, 4096), (1, 512, 4096), (2, 2048, 4096))

MLP = ((128, 256), (256, 1024), (1024, 4096))


def find_cases(dtype: torch.dtype = torch.float32, quick: bool = False) -> list[Case]:
    """The whole grid in one dtype, or the few cases of the short run."""
    cases = [replace(case, dtype=dtype) for case in (*images(), *volumes(), *rows(), *tiny())]
    return [case for case in cases if case.quick] if quick else cases


def in_both_layouts(cases: Iterable[Case]) -> Iterator[Case]:
    for case in cases:
        yield case
        yield replace(case, channels_last=True)


def images() -> Iterator[Case]:
    """Batch norm of two image networks, group norm of a diffusion model."""
    for place, shapes, chosen in (
        ("ResNet-50", RESNET50, {(8, 256, 56), (8, 2048, 7)}),
        ("MobileNetV2", MOBILENETV2, {(8, 96, 112), (8, 576, 14)}),
    ):
        for batch in BATCHES:
            for c, side in shapes:
                quick = (batch, c, side) in chosen
                case = Case(place, "BatchNorm2d", (c,), (batch, c, side, side), quick=quick)
                yield from in_both_layouts([case])
    for c, side in DIFFUSION:
        case = Case("diffusion U-Net", "GroupNorm", (32, c), (2, c, side, side), quick=c == 640)
        yield from in_both_layouts([case])


def volumes() -> Iterator[Case]:
    """Instance norm of a network for medical volumes."""
    for c, side in NNUNET:
        case = Case("nnU-Net", "InstanceNorm3d", (c,), (2, c, side, side, side), quick=c == 128)
        yield from in_both_layouts([case])


def rows() -> Iterator[Case]:
    """Layer and RMS norm of transformers, batch norm of networks without positions."""
    for place, shapes in (("ViT-B", VIT), ("language model 4096", LANGUAGE)):
        for shape in shapes:
            for kind in ("LayerNorm", "RMSNorm"):
                yield Case(place, kind, (shape[-1],), shape, quick=shape in (VIT[1], LANGUAGE[1]))
    for n, c in MLP:
        yield Case("MLP", "BatchNorm1d", (c,), (n, c), quick=c == 1024)


def tiny() -> Iterator[Case]:
    """Inputs so small that calling costs more than computing."""
    for n, c in ((8, 16), (32, 64), (64, 768)):
        quick = n == 8
        yield Case("tiny", "BatchNorm1d", (c,), (n, c), quick=quick)
        yield Case("tiny", "LayerNorm", (c,), (n, c), quick=quick)
        yield Case("tiny", "RMSNorm", (c,), (n, c), quick=quick)
        yield Case("tiny", "GroupNorm", (4, c), (n, c), quick=quick)
        if n < 64:
            yield Case("tiny", "InstanceNorm1d", (c,), (n, c, 8), quick=quick)
    yield Case("tiny", "BatchNorm2d", (16,), (2, 16, 4, 4))
