"""The table that is the library: every norm as three answers to three questions.

    y = (x - mean) / sqrt(var + eps) * gamma + beta

Which elements share a mean and a variance (``pattern``, ``centred``), where mean and variance come from
(``sources``), and over what gamma and beta vary (``affine``). README, docs, tests and ``anynorm list`` read this table.

Axis letters, fixed for the whole project: n one or more sample axes, c channel, s zero or more spatial axes,
g group, k channel in its group, d one or more feature axes, b ghost batch, m sample in its ghost batch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from .pooling import Pooling, Sizes, find_pooling
from .sources import NAMES, Batch, Given, Merged, Renorm, Source


@dataclass(frozen=True)
class Scheme:
    """One norm of the family.

    Attributes:
        name: the norm's name, as in ``anynorm compare --norms``.
        pattern: axes of x ``->`` axes that keep statistics of their own; what is missing on the right is pooled.
        centred: whether the mean is subtracted (RMS norm subtracts nothing).
        sources: where mean and variance come from, in training and in evaluation.
        affine: the axes gamma and beta vary over.
        classes: the modules, named as in torch.nn where it has them.
        function: the function in ``anynorm.functional``; none where a layer must remember more than tensors.
        variant_of: the norm whose constructor, state and evaluation this one shares, where it has no class of its own
            in torch.nn.
        ghosts: the axis of ghost batches, each of which moves the running averages in its turn; "" for none.
    """

    name: str
    pattern: str
    centred: bool
    sources: tuple[type[Source], ...]
    affine: str
    classes: tuple[str, ...]
    function: str
    variant_of: str = ""
    ghosts: str = ""

    def pool(self, x: Tensor, sizes: Sizes = ()) -> Pooling:
        """The pattern, worked out for x."""
        return find_pooling(self.pattern, self.affine, self.centred, x.dim(), sizes, self.ghosts)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources in one word each, for tables."""
        return tuple(NAMES[source] for source in self.sources)

    @property
    def fused(self) -> tuple[str, ...]:
        """The modules that add a residual and apply an activation too: ``BatchNorm2d`` has ``BatchNormAct2d``."""
        return tuple(re.sub("([Nn]orm)", r"\1Act", name) for name in self.classes)


# fmt: off
FAMILY: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        #      name        statistics shared by    centred sources               affine over
        Scheme("batch",    "n c s -> c",           True,   (Batch, Given), "c",
               ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), "batch_norm"),
        Scheme("ghost",    "(b m) c s -> b c",     True,   (Batch, Given), "c",
               ("GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"), "ghost_batch_norm", "batch", "b"),
        Scheme("renorm",   "n c s -> c",           True,   (Renorm, Given), "c",
               ("BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"), "batch_renorm", "batch"),
        Scheme("sync",     "n c s -> c",           True,   (Merged, Given), "c",
               ("SyncBatchNorm",), "", "batch"),
        Scheme("layer",    "n d -> n",             True,   (Batch,),       "d",
               ("LayerNorm",), "layer_norm"),
        Scheme("rms",      "n d -> n",             False,  (Batch,),       "d",
               ("RMSNorm",), "rms_norm"),
        Scheme("instance", "n c s -> n c",         True,   (Batch, Given), "c",
               ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), "instance_norm"),
        Scheme("group",    "n (g k) s -> n g",     True,   (Batch,),       "g k",
               ("GroupNorm",), "group_norm"),
    )
}
# fmt: on
