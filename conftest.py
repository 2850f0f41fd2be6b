"""What the examples in docstrings may use, and what no test may leave behind."""

import warnings

import pytest
import torch
import torch.nn.modules.module as modules

import anynorm
from anynorm.padding import hooks


@pytest.fixture(autouse=True)
def names_for_doctests(doctest_namespace):
    doctest_namespace.update(anynorm=anynorm, torch=torch)


@pytest.fixture(autouse=True)
def no_hooks_on_all_modules(request):
    """Hooks on all modules that a test leaves are named and removed: torch.compile would warn in every later test."""
    yield
    if not modules._has_any_global_hook():
        return
    state = f"{hooks.OPEN[0]} contexts open, {len(hooks.REGIONS)} graphs to be computed again"
    warnings.warn(f"{request.node.nodeid} left hooks on all modules; {state}", stacklevel=1)
    hooks.OPEN[0] = 0
    while hooks.STANCE:
        if (stance := hooks.STANCE.pop()) is not None:
            stance.__exit__(None, None, None)
    hooks.expect_no_recomputation()
    for left in (
        modules._global_forward_pre_hooks,
        modules._global_forward_hooks,
        modules._global_backward_pre_hooks,
        modules._global_backward_hooks,
    ):
        left.clear()


@pytest.fixture(scope="module")
def one_thread():
    """Time on one thread, so that tests side by side disturb one another less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
