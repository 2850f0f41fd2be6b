"""The options of recurrent layers for the norms inside, and how they fit each other."""

from __future__ import annotations

from ...errors import UserError

NORMS = ("layer", "batch-per-step", "batch-sequence")
ON_SINGLE = ("running", "error")


def check_options(name: str, norm: str | None, max_steps: int | None, on_single: str, eps: float) -> None:
    """Hold a recurrent layer's options for its norms against each other."""
    if norm is not None and norm not in NORMS:
        known = ", ".join(map(repr, NORMS))
        raise UserError(f"{name}: norm must be one of {known} or None; got {norm!r}; choose one of them")
    if norm == "batch-per-step" and max_steps is None:
        raise UserError(
            f"{name}: norm='batch-per-step' needs max_steps, how many steps have statistics of their own; got None; "
            "try the length of most sequences, max_steps=100"
        )
    if norm != "batch-per-step" and max_steps is not None:
        raise UserError(f"{name}: max_steps is for norm='batch-per-step'; got norm={norm!r}; leave max_steps out")
    if max_steps is not None and (not isinstance(max_steps, int) or max_steps < 1):
        raise UserError(f"{name}: max_steps must be a whole number of 1 or more; got {max_steps!r}; try 100")
    if on_single not in ON_SINGLE:
        raise UserError(f"{name}: on_single must be 'running' or 'error'; got {on_single!r}; the default is 'running'")
    if not eps > 0:
        raise UserError(f"{name}: eps must be positive; got {eps}; the default is 1e-5")
