"""What tests of `fold` share."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn

import anynorm

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def shake(model: nn.Module, positive: bool = False, shifted: bool = True) -> nn.Module:
    """The model in float64 and evaluation, with averages, gammas (negative ones too) and betas that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.double().eval().modules():
        if getattr(module, "running_var", None) is None:
            continue
        with torch.no_grad():
            module.running_var.uniform_(0.3, 2, generator=generator)
            if shifted:
                module.running_mean.normal_(generator=generator)
            if module.weight is not None:
                module.weight.normal_(generator=generator)
                if positive:
                    module.weight.abs_()
                if shifted:
                    module.bias.normal_(generator=generator)
    return model


def check(model: nn.Module, *inputs: torch.Tensor, changed: int, example: bool = True) -> anynorm.SurgeryReport:
    """Fold copies in both precisions: so many norms, the same outputs, nothing of ours left; the float64 report."""
    reports = []
    for dtype, tolerance in DTYPES.items():
        twin, given = copy.deepcopy(model).to(dtype), tuple(each.to(dtype) for each in inputs)
        with torch.no_grad():
            before = twin(*given).clone()
            report = anynorm.fold(twin, example=given if example else None)
            after = twin(*given)
        assert len(report.changed) == changed, f"{report}"
        error, scale = float((after - before).abs().max()), float(before.abs().max())
        assert error <= tolerance * scale, f"off by {error} of {scale}; {report}"
        assert not any("anynorm" in type(module).__module__ for module in twin.modules())
        assert report.model is twin
        reports.append(report)
    return reports[0]


def find_reason(report: anynorm.SurgeryReport, name: str) -> str:
    """Why a norm was left."""
    (entry,) = (entry for entry in report.left if entry.name == name)
    return entry.reason
