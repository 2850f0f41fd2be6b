"""Packed sequences and jagged tensors: every norm gives what it gives for the padded batch with its mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm import functional
from padding.mask_cases import LENGTHS, NORMS, sequences


def make_all(name: str) -> list[nn.Module]:
    kinds = [NORMS[name](4) for _ in range(4)]
    if name == "instance":
        kinds = [anynorm.InstanceNorm1d(4, affine=True, track_running_stats=True) for _ in range(4)]
    return kinds


@pytest.mark.parametrize("name", NORMS)
def test_padded_packed_and_jagged_agree(name):
    padded_norm, packed_norm, jagged_norm, last_norm = make_all(name)
    rows = sequences()
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
    flat = name in ("layer", "rms")
    y = padded_norm(padded if flat else padded.mT.contiguous(), lengths=LENGTHS)
    y = y if flat else y.mT
    real = torch.cat([y[i, :length] for i, length in enumerate(LENGTHS)])

    leaf = torch.cat(rows).requires_grad_()
    jagged = torch.nested.nested_tensor_from_jagged(leaf, lengths=None, offsets=torch.tensor([0, 5, 6, 10]))
    z = jagged_norm(jagged)
    assert z.is_nested
    torch.testing.assert_close(z.values(), real, atol=1e-6, rtol=1e-6)
    z.values().sin().sum().backward()
    (true,) = torch.autograd.grad(padded_norm_again(name, leaf).sin().sum(), leaf)
    torch.testing.assert_close(leaf.grad, true, atol=1e-5, rtol=1e-5)

    if not flat:
        w = last_norm(torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2))
        assert w.shape[1] == 4
        torch.testing.assert_close(w.transpose(1, 2).values(), real, atol=1e-6, rtol=1e-6)

    packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    v, _ = nn.utils.rnn.pad_packed_sequence(packed_norm(packed), batch_first=True)
    torch.testing.assert_close(
        torch.cat([v[i, :length] for i, length in enumerate(LENGTHS)]), real, atol=1e-6, rtol=1e-6
    )
    for other in (packed_norm, jagged_norm):
        for key, value in padded_norm.state_dict().items():
            torch.testing.assert_close(other.state_dict()[key], value, msg=key)


def padded_norm_again(name: str, rows: Tensor) -> Tensor:
    """The rows padded, normalized, and taken out again."""
    parts = rows.split(LENGTHS)
    padded = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    norm = make_all(name)[0]
    flat = name in ("layer", "rms")
    y = norm(padded if flat else padded.mT.contiguous(), lengths=LENGTHS)
    y = y if flat else y.mT
    return torch.cat([y[i, :length] for i, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("kind", ["BatchNormAct1d", "InstanceNormAct1d", "GroupNormAct", "LayerNormAct"])
def test_what_follows_a_ragged_norm(kind):
    fused = getattr(anynorm, kind)(*((2, 4) if kind == "GroupNormAct" else (4,)), activation="silu")
    plain = getattr(anynorm, kind.replace("Act", ""))(*((2, 4) if kind == "GroupNormAct" else (4,)))
    rows, more = sequences(), [row + 1 for row in sequences()]
    for make in (lambda r: torch.nested.nested_tensor(r, layout=torch.jagged), pack):
        x, residual = make(rows), make(more)
        y, z = fused(x, residual=residual), plain(x)
        y, z, added = (t.data if isinstance(t, nn.utils.rnn.PackedSequence) else t.values() for t in (y, z, residual))
        torch.testing.assert_close(y, nn.functional.silu(z + added), atol=1e-6, rtol=1e-6)


def pack(rows: list[Tensor]) -> nn.utils.rnn.PackedSequence:
    return nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: functional.group_norm(x, 3), RuntimeError, "channels=4, groups=3; try 1 or 2"),
        (lambda x: functional.group_norm(x, 2, activation="softplus"), ValueError, "activation must be one of"),
        (lambda x: functional.instance_norm(x, use_input_stats=False), RuntimeError, "needs running statistics"),
        (lambda x: functional.instance_norm(x, torch.zeros(3), torch.ones(3)), RuntimeError, "one element per channel"),
        (lambda x: functional.layer_norm(x, (4,), lengths=[5, 1, 4]), ValueError, "has no padding"),
        (lambda x: functional.group_norm(x, 2, residual=x.data), ValueError, "residual must be ragged"),
        (lambda x: functional.group_norm(x, 2, residual=pack(sequences()[:2])), RuntimeError, "shape of the input"),
    ],
)
def test_ragged_inputs_are_checked(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(pack(sequences()))
