"""Networks that branch, meet, share modules and pad in every way: folded, accelerated, frozen, against themselves."""

from __future__ import annotations

import pytest
import torch

from fuzz.drive import drive
from fuzz.folding import DONE, check_fold
from fuzz.webs import webs

pytestmark = pytest.mark.filterwarnings("ignore")
LEAST = 300  # networks of each dimension in `make fuzz`


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small wait for their threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_fold(dims):
    DONE.clear()
    drive(check_fold, webs(dims), LEAST)
    assert DONE["norms"] >= DONE["networks"]
    assert DONE["frozen"] >= 0.5 * DONE["norms"] / 2, dict(DONE)  # norms are counted once for each precision
    for example in (True, False) if dims else (True,):  # a linear layer's axes are not known without
        assert DONE["folded", example] >= 0.1 * DONE["norms"], dict(DONE)
