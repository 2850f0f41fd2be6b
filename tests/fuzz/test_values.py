"""Every norm, along every path, equals the formula in NumPy float64: y, all gradients, running averages."""

from __future__ import annotations

import pytest

from fuzz.call import check_values
from fuzz.cases import NORMS, cases, is_allowed
from fuzz.drive import drive

pytestmark = pytest.mark.filterwarnings("ignore:.*one value per")


@pytest.mark.parametrize("norm", NORMS)
def test_values(norm):
    drive(check_values, cases((norm,)).filter(is_allowed))
