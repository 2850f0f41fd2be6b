"""anynorm: batch normalization and its family as one formula, drop-in for torch.nn.

    y = (x - mean) / sqrt(var + eps) * gamma + beta

`anynorm.accelerate(model)` is the whole migration.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import functional
from .engine.paths import exact
from .errors import PatternError, SyncError, UserError
from .family import FAMILY
from .modules.batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .modules.counting import update_once
from .modules.group import GroupNorm
from .modules.instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .modules.layer import LayerNorm
from .modules.rms import RMSNorm
from .padding.context import masked
from .padding.masks import mask_of
from .surgery.import_hook import register_with_packages
from .version import __version__

if TYPE_CHECKING:
    from . import reference
    from .accumulation.accumulate import accumulate
    from .doctor.diagnose import diagnose
    from .doctor.diagnosis import Diagnosis
    from .doctor.monitor.monitor import Monitor
    from .engine.allocator import tune_allocator
    from .modules.chosen_domain import domain
    from .modules.domain import DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d
    from .modules.extra_state import extra_state, load_extra_state
    from .modules.fused import (
        BatchNormAct1d,
        BatchNormAct2d,
        BatchNormAct3d,
        BatchRenormAct1d,
        BatchRenormAct2d,
        BatchRenormAct3d,
        GhostBatchNormAct1d,
        GhostBatchNormAct2d,
        GhostBatchNormAct3d,
        GroupNormAct,
        InstanceNormAct1d,
        InstanceNormAct2d,
        InstanceNormAct3d,
        LayerNormAct,
        RMSNormAct,
        SyncBatchNormAct,
    )
    from .modules.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
    from .modules.lazy import (
        LazyBatchNorm1d,
        LazyBatchNorm2d,
        LazyBatchNorm3d,
        LazyInstanceNorm1d,
        LazyInstanceNorm2d,
        LazyInstanceNorm3d,
    )
    from .modules.pattern import AnyNorm
    from .modules.recurrent.layers import GRU, LSTM
    from .modules.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
    from .modules.sync import SyncBatchNorm
    from .padding.shorten import shorten
    from .surgery.accelerate import accelerate
    from .surgery.adaptation.adapt import adapt
    from .surgery.adapters import register
    from .surgery.convert import convert
    from .surgery.fold.fold import fold
    from .surgery.freeze import freeze, unfreeze
    from .surgery.operation import NotProved
    from .surgery.param_groups import param_groups
    from .surgery.recalibration.recalibrate import recalibrate
    from .surgery.report import SurgeryReport
    from .surgery.sync import sync

# Loaded when they are first asked for: together they would take two thirds of the import.
LATER = {
    "Diagnosis": ".doctor.diagnosis",
    "diagnose": ".doctor.diagnose",
    "AnyNorm": ".modules.pattern",
    "BatchNormAct1d": ".modules.fused",
    "BatchNormAct2d": ".modules.fused",
    "BatchNormAct3d": ".modules.fused",
    "BatchRenorm1d": ".modules.renorm",
    "BatchRenorm2d": ".modules.renorm",
    "BatchRenorm3d": ".modules.renorm",
    "BatchRenormAct1d": ".modules.fused",
    "BatchRenormAct2d": ".modules.fused",
    "BatchRenormAct3d": ".modules.fused",
    "DomainBatchNorm1d": ".modules.domain",
    "DomainBatchNorm2d": ".modules.domain",
    "DomainBatchNorm3d": ".modules.domain",
    "GRU": ".modules.recurrent.layers",
    "GhostBatchNorm1d": ".modules.ghost",
    "GhostBatchNorm2d": ".modules.ghost",
    "GhostBatchNorm3d": ".modules.ghost",
    "GhostBatchNormAct1d": ".modules.fused",
    "GhostBatchNormAct2d": ".modules.fused",
    "GhostBatchNormAct3d": ".modules.fused",
    "GroupNormAct": ".modules.fused",
    "InstanceNormAct1d": ".modules.fused",
    "InstanceNormAct2d": ".modules.fused",
    "InstanceNormAct3d": ".modules.fused",
    "LSTM": ".modules.recurrent.layers",
    "LayerNormAct": ".modules.fused",
    "LazyBatchNorm1d": ".modules.lazy",
    "LazyBatchNorm2d": ".modules.lazy",
    "LazyBatchNorm3d": ".modules.lazy",
    "LazyInstanceNorm1d": ".modules.lazy",
    "LazyInstanceNorm2d": ".modules.lazy",
    "LazyInstanceNorm3d": ".modules.lazy",
    "Monitor": ".doctor.monitor.monitor",
    "NotProved": ".surgery.operation",
    "RMSNormAct": ".modules.fused",
    "SurgeryReport": ".surgery.report",
    "SyncBatchNorm": ".modules.sync",
    "SyncBatchNormAct": ".modules.fused",
    "accelerate": ".surgery.accelerate",
    "accumulate": ".accumulation.accumulate",
    "adapt": ".surgery.adaptation.adapt",
    "convert": ".surgery.convert",
    "domain": ".modules.chosen_domain",
    "extra_state": ".modules.extra_state",
    "fold": ".surgery.fold.fold",
    "freeze": ".surgery.freeze",
    "load_extra_state": ".modules.extra_state",
    "param_groups": ".surgery.param_groups",
    "recalibrate": ".surgery.recalibration.recalibrate",
    "reference": ".reference",
    "register": ".surgery.adapters",
    "shorten": ".padding.shorten",
    "sync": ".surgery.sync",
    "tune_allocator": ".engine.allocator",
    "unfreeze": ".surgery.freeze",
}

register_with_packages()

__all__ = [
    "FAMILY",
    "GRU",
    "LSTM",
    "AnyNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormAct1d",
    "BatchRenormAct2d",
    "BatchRenormAct3d",
    "Diagnosis",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostBatchNormAct1d",
    "GhostBatchNormAct2d",
    "GhostBatchNormAct3d",
    "GroupNorm",
    "GroupNormAct",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "LayerNorm",
    "LayerNormAct",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "Monitor",
    "NotProved",
    "PatternError",
    "RMSNorm",
    "RMSNormAct",
    "SurgeryReport",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "SyncError",
    "UserError",
    "__version__",
    "accelerate",
    "accumulate",
    "adapt",
    "convert",
    "diagnose",
    "domain",
    "exact",
    "extra_state",
    "fold",
    "freeze",
    "functional",
    "load_extra_state",
    "mask_of",
    "masked",
    "param_groups",
    "recalibrate",
    "reference",
    "register",
    "shorten",
    "sync",
    "tune_allocator",
    "unfreeze",
    "update_once",
]


if not TYPE_CHECKING:  # to checkers every name would exist

    def __getattr__(name: str) -> Any:
        if name not in LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(LATER[name], __name__)
        globals()[name] = found = getattr(module, name, module)  # `reference` is the module itself
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *LATER})
