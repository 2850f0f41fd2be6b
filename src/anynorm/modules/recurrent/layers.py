"""Recurrent layers with norms inside: `LSTM` and `GRU`, torch.nn's with ``norm=`` and ``lengths=``.

Without a norm the numbers are torch's; with one they come from rows, the positions that are there, and the norms from
the one engine.
"""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .cell import Cell, State
from .recurrence import Recurrent

__all__ = ["GRU", "LSTM"]


class LSTM(Recurrent, nn.LSTM):
    """`torch.nn.LSTM` with norms inside, and with lengths of padded sequences.

    i, f, g, o = split(norm_ih(W_ih x[t]) + norm_hh(W_hh h[t-1]))         each norm ends with + its bias
    c[t] = sigmoid(f) * c[t-1] + sigmoid(i) * tanh(g)
    h[t] = sigmoid(o) * tanh(norm_cell(c[t]))

    norm              statistics over                                         at               gamma begins at
    "layer"           a row of all four gates; of the cell's row              ih, hh, cell     1
    "batch-per-step"  the sequences that still run at that step, per channel  ih, hh, cell     0.1
    "batch-sequence"  every step of every sequence, per channel               ih               1
    None              nothing: torch's own layer                              nowhere

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as for
            torch.nn.LSTM. ``bias_ih`` and ``bias_hh`` are the beta of the two norms and begin at 0; ``bias=False``
            takes the cell's beta away too.
        norm: one of the above.
        max_steps: for "batch-per-step", how many steps have running averages of their own; later steps share the last.
        on_single: for "batch-per-step" in training, what a step does at which a single sequence still runs, as the
            tail of almost every ragged batch: "running" normalizes it by the running averages of that step (of the
            last step that has any) and leaves them as they are; "error" refuses the batch. A batch of one sequence is
            refused either way: there is nothing to learn statistics from.
        eps: in units of x squared.
        momentum: weight of the new value in the running averages; None for a cumulative average.

    Returns:
        From a call: output and last states, shaped, packed or padded as torch's layer returns them; see `forward`.

    Raises:
        UserError: options that do not fit each other.

    Note:
        Batches are normalized by their population variance; running averages move towards n/(n-1) times that.

    Source:
        "layer": Ba, Kiros and Hinton 2016, arXiv:1607.06450, supplementary material, the LSTM. "batch-per-step":
        Cooijmans et al. 2016, arXiv:1603.09025, section 3. "batch-sequence": Laurent et al. 2015, arXiv:1510.01378.

    Example:
        >>> lstm = anynorm.LSTM(3, 5, batch_first=True, norm="layer")
        >>> output, (h, c) = lstm(torch.randn(2, 7, 3), lengths=[7, 4])
        >>> output.shape, h.shape, bool((output[1, 4:] == 0).all())
        (torch.Size([2, 7, 5]), torch.Size([1, 2, 5]), True)
    """

    gates: tuple[int, ...] = (4,)
    has_cell = True

    def _step(self, cell: Cell, x: Tensor, state: State, step: int) -> State:
        """i, f, g, o = split(x + u); c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(norm(c))."""
        h, c = state
        i, f, g, o = (x + cell.from_hidden(h, step)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.from_cell(c, step).tanh()
        if cell.weight_hr is not None:
            h = F.linear(h, cell.weight_hr)
        return h, c


class GRU(Recurrent, nn.GRU):
    """`torch.nn.GRU` with norms inside, and with lengths of padded sequences.

    u = norm_ih(W_ih x[t]),  v = norm_hh(W_hh h[t-1])                      each norm ends with + its bias
    r = sigmoid(u_r + v_r),  z = sigmoid(u_z + v_z)
    n = tanh(u_n + r * v_n)                                                reset after the product, as in torch
    h[t] = (1 - z) * n + z * h[t-1]

    "layer" takes r and z of a row together and n apart; "batch-per-step" is Cooijmans' for the LSTM, without a cell.
    Arguments, norms and errors are those of `LSTM`, without proj_size.

    Source:
        "layer": Ba, Kiros and Hinton 2016, arXiv:1607.06450, supplementary material, the GRU. See `LSTM`.

    Example:
        >>> gru = anynorm.GRU(3, 5, norm="batch-per-step", max_steps=4)
        >>> output, h = gru(torch.randn(7, 2, 3), lengths=[7, 4])
        >>> gru.norm_ih_l0.num_batches_per_step  # 7 steps; from the fifth on a single sequence runs
        tensor([1, 1, 1, 1])
    """

    gates: tuple[int, ...] = (2, 1)
    has_cell = False

    def _step(self, cell: Cell, x: Tensor, state: State, step: int) -> State:
        """r, z = sigmoid(split(x + v)); n = tanh(x_n + r v_n); h = (1 - z) n + z h."""
        (h,) = state
        parts = 2 * self.hidden_size, self.hidden_size
        x_rz, x_n = x.split(parts, -1)
        v_rz, v_n = cell.from_hidden(h, step).split(parts, -1)
        r, z = (x_rz + v_rz).sigmoid().chunk(2, -1)
        n = (x_n + r * v_n).tanh()
        return ((1 - z) * n + z * h,)
