"""AnyNorm equals the formula in NumPy float64 for patterns that nobody named."""

from __future__ import annotations

import pytest

from fuzz.drive import drive
from fuzz.patterns import check_pattern, is_pattern, patterns

pytestmark = pytest.mark.filterwarnings("ignore:.*one value per")


def test_patterns():
    drive(check_pattern, patterns().filter(is_pattern))
