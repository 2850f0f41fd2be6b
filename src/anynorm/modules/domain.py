"""`DomainBatchNorm1d/2d/3d`: batch norm with averages for each domain, of which `anynorm.domain` chooses one."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch.nn as nn
from torch import Tensor

from ..errors import UserError, check_state
from ..torch_private import not_compiled
from . import batch
from .checkpoints import repair_state
from .chosen_domain import CHOSEN, NoDomainError, check_domains, check_tracking, domain
from .ghost import show_options
from .recomputation import read_or_replay

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import BatchNormKeywords

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")
T = TypeVar("T", bound="_DomainBatch")


class _Domain(batch._BatchNorm):
    """What domain batch norm does otherwise than batch norm.

    Attributes:
        domains: their names; `running_mean_night` and its like are the buffers of one.
        shared_affine: whether gamma and beta are the same for all; else they are `weight_night` and so on.
        running_mean, running_var, num_batches_tracked, and `weight` and `bias`: those of the chosen domain.
    """

    domains: tuple[str, ...]
    shared_affine: bool

    def __getattr__(self, name: str) -> Any:
        # The constructor, and pickle, look for attributes before there are domains.
        if "domains" in vars(self) and name in self.list_split():
            name = f"{name}_{self.find_domain(CHOSEN.get())}"
        return super().__getattr__(name)

    def find_domain(self, name: str | None) -> str:
        """The name, if it is one of ours.

        Raises:
            NoDomainError: it is not.
        """
        if name in self.domains:
            return name
        label = f"{self.label} = " if self.label else ""
        got = "none chosen" if name is None else repr(name)
        raise NoDomainError(
            f"{label}{type(self).__name__}({self.num_features}): the domain must be one of {', '.join(self.domains)}; "
            f'got {got}; call the model within anynorm.domain("{self.domains[0]}")'
        )

    def normalize(
        self, input: Any, residual: Any = None, activation: Any = None, mask: Any = None, lengths: Any = None
    ) -> Any:
        """As batch norm does, with the averages of the chosen domain."""
        # A graph would keep the domain that it was traced in. Where no compiler was loaded, none is loaded for that.
        normalize = self._normalize_uncompiled if "torch._dynamo" in sys.modules else self._normalize_in_domain
        return normalize(input, residual, activation, mask, lengths)

    def _normalize_in_domain(self, input: Any, *options: Any) -> Any:
        (name,) = read_or_replay(self, (CHOSEN.get(),))
        with domain(self.find_domain(name)):
            return super().normalize(input, *options)

    _normalize_uncompiled = not_compiled(_normalize_in_domain)

    def _split(self, domains: tuple[str, ...], shared_affine: bool) -> None:
        """Give each domain a copy of the averages, and of gamma and beta where these are not shared."""
        for name in STATISTICS:
            buffer = self._buffers.pop(name)
            for each in domains:
                self.register_buffer(f"{name}_{each}", None if buffer is None else buffer.detach().clone())
        for name in () if shared_affine or not self.affine else AFFINE:
            known = self._parameters.pop(name)
            for each in domains:
                twin = None if known is None else nn.Parameter(known.detach().clone(), known.requires_grad)
                self.register_parameter(f"{name}_{each}", twin)
        self.domains, self.shared_affine = domains, shared_affine

    def list_split(self) -> tuple[str, ...]:
        """What each domain has."""
        return STATISTICS if self.shared_affine or not self.affine else (*STATISTICS, *AFFINE)

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1 and no batch counted, of every domain."""
        for name in vars(self).get("domains", (None,)):
            with domain(name):
                super().reset_running_stats()

    def reset_parameters(self) -> None:
        """Gamma 1, beta 0, and `reset_running_stats`, of every domain."""
        for name in vars(self).get("domains", (None,)):
            with domain(name):
                super().reset_parameters()  # type: ignore[misc] # as above

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        state = self._spread(state_dict, prefix)
        wrong: list[str] = []
        for each in self.domains:
            state = repair_state(state, prefix, f"_{each}")
            wrong += check_state(state, prefix, f"_{each}")
        rest[-1].extend(wrong)  # load_state_dict raises them together.
        if not wrong:
            # Version 2: what older checkpoints have not is there by now.
            super()._load_from_state_dict(state, prefix, {**local_metadata, "version": 2}, *rest)

    def _spread(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A checkpoint's entries; where they are an ordinary batch norm's, one for each domain."""
        split = [name for name in self.list_split() if prefix + name in state_dict]
        if not split or any(f"{prefix}{name}_{each}" in state_dict for name in split for each in self.domains):
            return state_dict
        state = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in split}}
        for name in split:
            for each in self.domains:
                value = state_dict[prefix + name]
                # Copies, since load_state_dict(assign=True) keeps what it is given.
                state[f"{prefix}{name}_{each}"] = value.clone() if isinstance(value, Tensor) else value
        if "num_batches_tracked" not in split:  # as from torch before 0.4.1
            for each in self.domains:
                key = f"num_batches_tracked_{each}"
                state[prefix + key] = self._buffers[key]
        warnings.warn(
            f"DomainBatchNorm: the state of an ordinary batch norm was loaded; each of the domains "
            f"{', '.join(self.domains)} starts from it",
            stacklevel=2,
        )
        return state


class _DomainBatch(_Domain, batch._Batch):
    """The constructor of torch's batch norms, `domains`, `shared_affine`, and the choices of `anynorm.BatchNorm2d`."""

    def __init__(
        self,
        num_features: int,
        *arguments: Any,
        domains: Iterable[str],
        shared_affine: bool = True,
        **options: Unpack[BatchNormKeywords],
    ) -> None:
        names = check_domains(type(self).__name__, domains)
        super().__init__(num_features, *arguments, **options)
        check_tracking(type(self).__name__, self.track_running_stats)
        self._split(names, shared_affine)

    @classmethod
    def from_batch_norm(cls: type[T], norm: nn.Module, domains: Iterable[str], shared_affine: bool = True) -> T:
        """A domain batch norm, each domain of which starts as a batch norm is.

        Args:
            norm: `torch.nn.BatchNorm2d` or `anynorm.BatchNorm2d`, for the dimension of this class; it stays as it is.
            domains, shared_affine: as for the constructor.

        Returns:
            Mode, hooks, dtype and device are those of `norm`; where gamma and beta are shared, so are they with it.

        Raises:
            UserError: a norm of another class, or without running averages; names that are none.
        """
        kinds = [kind for kind in cls.__mro__ if kind in THEIRS.values()]
        names = check_domains(cls.__name__, domains)
        if type(norm) not in (*kinds, *(ours for ours, theirs in OURS.items() if theirs in kinds)):
            raise UserError(
                f"{cls.__name__}.from_batch_norm: norm must be a {kinds[0].__name__} of torch.nn or anynorm; got "
                f"{type(norm).__name__}; anynorm.accelerate(model, undo=True) takes fused ones apart"
            )
        check_tracking(cls.__name__, norm.running_mean is not None)
        made = cls.__new__(cls)
        vars(made).update({key: t.copy() if isinstance(t, dict | set) else t for key, t in vars(norm).items()})
        made._split(names, shared_affine)
        return made

    def extra_repr(self) -> str:
        """The arguments of batch norm, and the domains."""
        own = f", domains={self.domains}" + ("" if self.shared_affine else ", shared_affine=False")
        with domain(self.domains[0]):  # whether there is a bias is the same for all
            return f"{super().extra_repr()}{own}"


class DomainBatchNorm1d(_DomainBatch, nn.BatchNorm1d):
    """`anynorm.BatchNorm1d` with running averages for each domain, for (N, C) or (N, C, L).

    y[n,c,s] = (x[n,c,s] - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c], mean and var of the chosen domain

    A network that learns from day and night, from real and synthetic, or from clean and adversarial images shares its
    weights between them, but their statistics differ, and one set of averages fits neither. Also called
    domain-specific, split or auxiliary batch norm. Every call is within ``anynorm.domain(name)``, and its batch of one
    domain.

    Args:
        num_features: C.
        eps, momentum, affine, device, dtype, bias: as for torch's batch norm.
        domains: names, each of which has running averages and a counter of its own.
        shared_affine: gamma and beta are the same for all domains; else each has its own, which DistributedDataParallel
            wants `find_unused_parameters` for.
        on_single, on_nonfinite: as for `anynorm.BatchNorm1d`.

    Raises:
        UserError: names that are no names; track_running_stats=False; at a call, where no domain is chosen or one that
            this norm has not.

    Note:
        State: `running_mean_night`, `running_var_night`, `num_batches_tracked_night` for each domain, and `weight` and
        `bias`, or `weight_night` and `bias_night`. The state of an ordinary batch norm loads, too, with a warning: each
        domain then starts from it. Attributes without a domain, such as `running_mean`, are those of the chosen one,
        and so tools that read them work within ``anynorm.domain``: `recalibrate` and `adapt` of that domain.
        torch.compile breaks its graph here, and stays right when the domain changes; what torch.export writes has the
        domain that is chosen then. torch.nn.SyncBatchNorm's converter would keep the chosen domain alone.

    Source:
        Chang et al. 2019, arXiv:1906.03950 (separate gamma and beta); Xie et al. 2020, arXiv:1911.09665 (auxiliary).

    Example:
        >>> norm = anynorm.DomainBatchNorm1d(1, domains=["clean", "adversarial"])
        >>> with anynorm.domain("adversarial"):
        ...     norm(torch.tensor([[1.0], [3.0]])).detach().T
        tensor([[-1.0000,  1.0000]])
        >>> norm.num_batches_tracked_clean, norm.num_batches_tracked_adversarial
        (tensor(0), tensor(1))
    """

    _axes: tuple[int, ...] = (2, 3)


class DomainBatchNorm2d(_DomainBatch, nn.BatchNorm2d):
    """`anynorm.BatchNorm2d` with running averages for each domain, for (N, C, H, W); see `DomainBatchNorm1d`.

    Example:
        >>> trained = torch.nn.BatchNorm2d(3)
        >>> norm = anynorm.DomainBatchNorm2d.from_batch_norm(trained, domains=("day", "night"))
        >>> norm.weight is trained.weight
        True
    """

    _axes: tuple[int, ...] = (4,)


class DomainBatchNorm3d(_DomainBatch, nn.BatchNorm3d):
    """`anynorm.BatchNorm3d` with running averages for each domain, for (N, C, D, H, W); see `DomainBatchNorm1d`.

    Example:
        >>> norm = anynorm.DomainBatchNorm3d(3, domains=("mr", "ct"), shared_affine=False)
        >>> with anynorm.domain("ct"):
        ...     norm(torch.randn(5, 3, 4, 4, 4)).shape
        torch.Size([5, 3, 4, 4, 4])
    """

    _axes: tuple[int, ...] = (5,)


THEIRS: dict[type[_DomainBatch], type[nn.Module]] = {
    DomainBatchNorm1d: nn.BatchNorm1d,
    DomainBatchNorm2d: nn.BatchNorm2d,
    DomainBatchNorm3d: nn.BatchNorm3d,
}
OURS: dict[type[nn.Module], type[nn.Module]] = {
    batch.BatchNorm1d: nn.BatchNorm1d,
    batch.BatchNorm2d: nn.BatchNorm2d,
    batch.BatchNorm3d: nn.BatchNorm3d,
}
for _kind, _theirs in THEIRS.items():
    show_options(_kind, _theirs, domains=inspect.Parameter.empty, shared_affine=True)
