"""Networks that branch and meet, share modules and pad in every way: folded and accelerated, against themselves."""

from __future__ import annotations

import pytest

from fuzz.drive import drive
from fuzz.folding import DONE, check_fold
from fuzz.webs import webs

pytestmark = pytest.mark.filterwarnings("ignore")


def test_fold():
    drive(check_fold, webs())
    print(dict(DONE))
    assert DONE["folded"] >= 0.15 * DONE["norms"]
    for what in ("with", "without"):
        assert DONE[f"folded, {what} example"] >= 0.1 * DONE["norms"] / 2
