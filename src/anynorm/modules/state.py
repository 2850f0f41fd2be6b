"""What may be loaded: checkpoints whose numbers cannot be a norm's are refused."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from ..errors import check_state


class CheckedState(nn.Module):
    """Refuses a negative running_var, complex parameters and a fractional counter, which torch loads silently."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        wrong = list(check_state(state_dict, prefix))
        if wrong:
            arguments[-1].extend(wrong)  # The error messages; load_state_dict raises them together.
            return
        super()._load_from_state_dict(state_dict, prefix, *arguments)
