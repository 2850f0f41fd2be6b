"""What is asked: the norms with the signatures of torch.nn.functional, checked and handed to the one engine.

Each function answers the three questions with its line of `family.FAMILY` and lets `ops.normalize` do the rest.
"""

import torch.fx

from .batch import batch_norm, instance_norm
from .ghost import ghost_batch_norm
from .renorm import batch_renorm
from .sample import group_norm, layer_norm, rms_norm

__all__ = ["batch_norm", "batch_renorm", "ghost_batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

# FX records a call of these as one node.
for name in __all__:
    torch.fx.wrap(name)
