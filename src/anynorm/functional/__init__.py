"""What is asked: the norms with the signatures of torch.nn.functional, checked and handed to the one engine.

Each function says its source and leaves the rest to its front (`front.Front`), and that to the engine.
"""

import torch.fx

from .batch import batch_norm
from .ghost import ghost_batch_norm
from .group import group_norm
from .instance import instance_norm
from .layer import layer_norm
from .renorm import batch_renorm
from .rms import rms_norm

__all__ = ["batch_norm", "batch_renorm", "ghost_batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

# FX records a call of these as one node.
for _name in __all__:
    torch.fx.wrap(_name)
