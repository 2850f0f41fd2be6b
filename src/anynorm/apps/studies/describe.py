"""The facts that the numbers of a study depend on: versions and machine."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

import anynorm


def find_versions() -> dict[str, str]:
    """Return the versions that the numbers of a study depend on."""
    return {
        "anynorm": getattr(anynorm, "__version__", "unknown"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def find_machine() -> dict[str, Any]:
    """Return the machine, and how many of torch's threads a run has."""
    return {"system": platform.platform(), "cores": os.cpu_count(), "torch_threads_per_run": 1}
