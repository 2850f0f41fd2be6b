"""Recurrent layers with norms in NumPy float64, one sequence and one step at a time: the oracle of test_recurrent.

Nothing is packed, flipped or shared with the library: each sequence is a list of vectors, and a norm gets the list of
vectors that it may look at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass
class Net:
    """A layer's options and its state_dict as float64 arrays; running averages are moved in place."""

    kind: str
    norm: str
    state: dict[str, Array]
    hidden: int
    layers: int
    directions: int
    max_steps: int = 0
    eps: float = 1e-5
    momentum: float = 0.1
    training: bool = True


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def normalize(net: Net, place: str, tail: str, rows: list[Array], step: int, beta: Array) -> list[Array]:
    """gamma * (row - mean) / sqrt(var + eps) + beta for each row."""
    name = f"norm_{place}_{tail}"
    gamma = net.state[f"{name}.weight"]
    beta = net.state.get(f"{name}.bias", beta)
    if net.norm == "layer":
        return [layer_norm(net, place, row) * gamma + beta for row in rows]
    means, variances = net.state[f"{name}.running_mean"], net.state[f"{name}.running_var"]
    if net.norm == "batch-sequence":
        counts, slot = net.state[f"{name}.num_batches_tracked"], ()
    else:
        counts, slot = net.state[f"{name}.num_batches_per_step"], (min(step, net.max_steps - 1),)
    if net.training and len(rows) > 1:
        mean = sum(rows) / len(rows)
        var = sum((row - mean) ** 2 for row in rows) / len(rows)
        unbiased = var * len(rows) / (len(rows) - 1)
        means[slot] = (1 - net.momentum) * means[slot] + net.momentum * mean
        variances[slot] = (1 - net.momentum) * variances[slot] + net.momentum * unbiased
        counts[slot] += 1
    else:
        while slot and slot[0] > 0 and counts[slot] == 0:
            slot = (slot[0] - 1,)
        mean, var = means[slot], variances[slot]
    return [(row - mean) / np.sqrt(var + net.eps) * gamma + beta for row in rows]


def layer_norm(net: Net, place: str, row: Array) -> Array:
    """All gates together; of a GRU r and z together and n apart."""
    cuts = [2 * net.hidden] if net.kind == "GRU" and place != "cell" else []
    parts = [(part - part.mean()) / np.sqrt(part.var() + net.eps) for part in np.split(row, cuts)]
    return np.concatenate(parts)


def run_direction(net: Net, tail: str, sequences: list[Array], states: list[tuple]) -> tuple[list[Array], list[tuple]]:
    """h at every step of every sequence, and the last state of each."""
    w_ih, w_hh = net.state[f"weight_ih_{tail}"], net.state[f"weight_hh_{tail}"]
    zero = np.zeros(len(w_ih))
    b_ih, b_hh = net.state.get(f"bias_ih_{tail}", zero), net.state.get(f"bias_hh_{tail}", zero)
    products = [[w_ih @ x for x in sequence] for sequence in sequences]
    if net.norm == "batch-sequence":
        flat = normalize(net, "ih", tail, [row for rows in products for row in rows], 0, b_ih)
        products = [[flat.pop(0) for _ in rows] for rows in products]
    outputs: list[list[Array]] = [[] for _ in sequences]
    states = list(states)
    for step in range(max(map(len, sequences))):
        alive = [i for i, sequence in enumerate(sequences) if len(sequence) > step]
        u = [products[i][step] for i in alive]
        v = [w_hh @ states[i][0] for i in alive]
        if net.norm == "batch-sequence":
            v = [row + b_hh for row in v]
        else:
            u = normalize(net, "ih", tail, u, step, b_ih)
            v = normalize(net, "hh", tail, v, step, b_hh)
        new = (step_lstm if net.kind == "LSTM" else step_gru)(net, tail, u, v, [states[i] for i in alive], step)
        for i, state in zip(alive, new, strict=True):
            states[i] = state
            outputs[i].append(state[0])
    return [np.array(rows) for rows in outputs], states


def step_lstm(net: Net, tail: str, u: list, v: list, states: list[tuple], step: int) -> list[tuple]:
    cells, gates = [], []
    for x, y, (_, c) in zip(u, v, states, strict=True):
        i, f, g, o = np.split(x + y, 4)
        cells.append(sigmoid(f) * c + sigmoid(i) * np.tanh(g))
        gates.append(sigmoid(o))
    told = cells
    if net.norm != "batch-sequence":
        told = normalize(net, "cell", tail, cells, step, np.zeros(net.hidden))
    return [(o * np.tanh(n), c) for o, n, c in zip(gates, told, cells, strict=True)]


def step_gru(net: Net, tail: str, u: list, v: list, states: list[tuple], step: int) -> list[tuple]:
    new = []
    for x, y, (h,) in zip(u, v, states, strict=True):
        (xr, xz, xn), (yr, yz, yn) = np.split(x, 3), np.split(y, 3)
        z, n = sigmoid(xz + yz), np.tanh(xn + sigmoid(xr + yr) * yn)
        new.append(((1 - z) * n + z * h,))
    return new


def run(net: Net, sequences: list[Array], start: tuple[Array, ...]) -> tuple[list[Array], tuple[Array, ...]]:
    """What the layer returns: each sequence's output, and (h_n,) or (h_n, c_n) shaped as torch's."""
    last: list[list[tuple]] = []
    for layer in range(net.layers):
        outputs = []
        for direction in range(net.directions):
            tail = f"l{layer}" + "_reverse" * direction
            turn = slice(None, None, -1 if direction else 1)
            states = [tuple(s[len(last), i] for s in start) for i in range(len(sequences))]
            out, states = run_direction(net, tail, [s[turn] for s in sequences], states)
            outputs.append([rows[turn] for rows in out])
            last.append(states)
        sequences = [np.concatenate(rows, -1) for rows in zip(*outputs, strict=True)]
    ends = tuple(np.array([[state[k] for state in states] for states in last]) for k in range(len(start)))
    return sequences, ends
