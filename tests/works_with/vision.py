"""torchvision, and what imports it (timm, segmentation-models-pytorch): import this first.

The torchvision of PyPI is built for CUDA on Linux. Beside a torch without CUDA its operators do not load, and the
import fails for want of two, which no classifier calls: they are declared here.
"""

import sys

import torch

try:
    import torchvision
except RuntimeError:
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torchvision  # noqa: F401
