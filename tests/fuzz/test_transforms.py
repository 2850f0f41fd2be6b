"""Under torch.func the norms equal the formula in NumPy float64 too."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from fuzz.cases import Case, cases, is_allowed, shapes
from fuzz.drive import drive
from fuzz.layouts import LAYOUTS
from fuzz.transforms import check_transforms, check_vmap

pytestmark = pytest.mark.filterwarnings("ignore:.*one value per")
NORMS = ("batch", "instance", "group", "layer", "rms")
SMALL = {"shape": shapes(largest=2000), "layout": st.sampled_from(LAYOUTS[:-1]), "path": "kernels"}


def test_transforms():
    drive(check_transforms, cases(NORMS, **SMALL).filter(is_allowed))


def has_no_mask(case: Case) -> bool:
    return is_allowed(case) and not case.mask


def test_vmap():
    drive(check_vmap, cases(NORMS, **SMALL).filter(has_no_mask))
