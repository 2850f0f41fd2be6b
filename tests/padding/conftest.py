"""What holds in every test of padding."""

import pytest
import torch
from torch.nn.modules import module as hooks_of_all_modules

from anynorm.padding import hooks
from anynorm.padding.context import CONTEXTS


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert CONTEXTS.opened == 0 == hooks.OPEN[0]
    assert not hooks_of_all_modules._global_forward_pre_hooks
    assert not hooks_of_all_modules._global_forward_hooks
