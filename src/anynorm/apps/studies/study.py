"""What a study is: a claim, the rule that judges it, the runs that it needs, and how one of them is performed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .data import Data
from .models import BUILT_IN, build
from .norms import NORMS, NormFactory
from .verdicts import Verdict
from .workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = str | int | float | bool


@dataclass(frozen=True)
class Trial:
    """One run: a network trained and measured.

    Attributes:
        arm: what is compared, such as the name of a norm.
        rate: learning rate.
        seed: of the start and the order of the data; arms with an equal seed are a pair.
        search: whether it only serves to choose a rate, and so must not look at test data.
        options: what else varies, as made by `Trial.of`.
    """

    arm: str
    rate: float
    seed: int
    search: bool = False
    options: tuple[tuple[str, Value], ...] = ()

    @staticmethod
    def of(arm: str, rate: float, seed: int, *, search: bool = False, **options: Value) -> Trial:
        """A trial with options by name: Trial.of("batch", 0.1, 0, size=8)."""
        return Trial(arm, rate, seed, search, tuple(sorted(options.items())))

    def __getitem__(self, name: str) -> Any:
        """An option by its name."""
        return dict(self.options)[name]

    @property
    def fields(self) -> dict[str, Value]:
        """Everything by name, as it stands in the trial's record."""
        return {"arm": self.arm, "rate": self.rate, "seed": self.seed, "search": self.search, **dict(self.options)}


@dataclass(frozen=True)
class Setting:
    """What a study is run on; it goes to the workers.

    Attributes:
        data: what is learned, in three parts.
        seeds: how many paired seeds are judged, numbered from 0.
        model: the user's network, `cnn` or `mlp`, or None for the study's own.
        norms: what the user wants compared, or None for the study's own arms.
        quick: whether it should only be seen that it runs, in 20 seconds.
        full: whether the published size is wanted, however long it takes.
    """

    data: Data
    seeds: int
    model: str | None = None
    norms: tuple[str, ...] | None = None
    quick: bool = False
    full: bool = False

    @property
    def networks(self) -> list[str]:
        """The user's network, or both that are built in; a table has no positions to convolve over."""
        if self.model is not None:
            return [self.model]
        return ["mlp", "cnn"] if len(self.data.sample_shape) in (2, 3) else ["mlp"]

    def build(
        self, norm: str | NormFactory, seed: int, own: Callable[[NormFactory, tuple[int, ...], int], nn.Module] | str
    ) -> nn.Module:
        """A network in training mode, from the seed alone: equal seeds give equal weights whatever the norm.

        Args:
            norm: a name out of NORMS, or a function of (num_features, dims).
            seed: of the start.
            own: the study's own network, `cnn`, `mlp` or a function of (norm, sample shape, classes); the user's
                takes its place.
        """
        make = NORMS[norm] if isinstance(norm, str) else norm
        chosen = own if self.model is None else self.model
        torch.manual_seed(seed)
        shape, classes = self.data.sample_shape, self.data.classes
        network = build(chosen, make, shape, classes) if isinstance(chosen, str) else chosen(make, shape, classes)
        return network.train()


Find = Callable[[Trial], Record | None]


class Results:
    """The finished trials of a study.

    Args:
        setting: what it was run on.
        trials: all trials that are known to be needed.
        find: gives the record of a trial, or None while it is unfinished.
    """

    setting: Setting
    trials: Sequence[Trial]

    def __init__(self, setting: Setting, trials: Sequence[Trial], find: Find) -> None:
        self.setting, self.trials = setting, trials
        found = [(trial, find(trial)) for trial in trials]
        records = [{**trial.fields, **record} for trial, record in found if record is not None]
        self.records: list[dict[str, Any]] = [record for record in records if record["status"] != "failed"]
        self.failures: list[dict[str, Any]] = [record for record in records if record["status"] == "failed"]
        self.missing: list[Trial] = [trial for trial, record in found if record is None]

    def where(self, **fields: Value) -> list[Record]:
        """Records whose fields have these values, in the order of their seeds; trials of the search only if asked."""
        fields = {"search": False, **fields}
        chosen = [r for r in self.records if all(r.get(name) == value for name, value in fields.items())]
        return sorted(chosen, key=lambda record: record["seed"])

    def values(self, key: str, **fields: Value) -> dict[int, float]:
        """What was measured, by seed; the fields must leave one record for each seed."""
        found: dict[int, float] = {}
        for record in self.where(**fields):
            if record["seed"] in found:
                raise ValueError(f"Results.values: {fields} leave two records of seed {record['seed']}")
            if record.get(key) is not None:
                found[record["seed"]] = record[key]
        return found

    def best_rate(self, by: str = "loss", **fields: Value) -> float:
        """The rate that `try_rates` chose among the trials of the search whose fields have these values."""
        return choose_rate(self.where(search=True, **fields), by)

    def find_width(self, step: float, **fields: Value) -> dict[int, float]:
        """By seed, how many trials reached their level, times `step`: the width of what works on a grid.

        Only seeds with as many trials as there are in the largest sweep.
        """
        sweeps: dict[int, list[bool]] = {}
        for record in self.where(**fields):
            sweeps.setdefault(record["seed"], []).append(record["reached"])
        whole = max(map(len, sweeps.values()), default=0)
        return {seed: step * sum(sweep) for seed, sweep in sweeps.items() if len(sweep) == whole}


@dataclass(frozen=True)
class Published:
    """A figure from a paper that stands beside ours."""

    source: str
    figure: str


@dataclass(frozen=True)
class Study:
    """A claim put to the test. What it says was written before its first run; a name finds it, as does its file.

    Attributes:
        name: what the command line calls it.
        title: the question, in one line.
        claim: the words of the document that is tested, with their place.
        design: how it is tested, in plain words.
        rule: when it counts as confirmed or refuted; printed with the verdict.
        published: figures of papers.
        differs: what differs from the papers.
        plan: every trial known to be needed, in order; asked again as trials finish.
        perform: one trial, in a process of its own; a record of what it measured, as JSON holds it, with a `status`,
            finished or diverged. It must depend on nothing but its arguments.
        judge: what the finished trials say.
        paint: the picture that shows it at a glance, on axes.
        data: what it is run on if the user does not say; see `load_data`.
        seeds: how many paired seeds it takes.
        has_published_size: whether it heeds `Setting.full`.
        refuses: options of the user that make no sense here, each with its reason.
        size: width and height of the picture, in inches.
    """

    name: str
    title: str
    claim: str
    design: str
    rule: str
    plan: Callable[[Setting, Find], Iterable[Trial]]
    perform: Callable[[Trial, Setting], Record]
    judge: Callable[[Results], Verdict]
    paint: Callable[[Results, Axes], None]
    published: tuple[Published, ...] = ()
    differs: str = ""
    data: str = "mnist"
    seeds: int = 5
    has_published_size: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    size: tuple[float, float] = (7.5, 4.0)


def try_rates(find: Find, trials: Sequence[Trial], by: str = "loss") -> tuple[float | None, Iterator[Trial]]:
    """(the best rate, the trials that find it) for an arm: the least mean of `by`, over trials that finished.

    None while a trial is unfinished. A rate at which any trial diverged comes after all others.
    """
    found = [(trial, find(trial)) for trial in trials]
    records = [{**trial.fields, **record} for trial, record in found if record is not None]
    return (choose_rate(records, by) if len(records) == len(trials) else None), iter(trials)


def choose_rate(records: Sequence[Record], by: str = "loss") -> float:
    """The rate with the least mean of `by`; one at which any trial diverged comes after all others."""
    means: dict[float, list[float]] = {}
    for record in records:
        value = record.get(by) if record["status"] == "finished" else None
        means.setdefault(record["rate"], []).append(float("inf") if value is None else value)
    return min(means, key=lambda rate: sum(means[rate]) / len(means[rate]))


def is_own(model: str) -> bool:
    """Whether a model is the user's, and not one that is built in."""
    return model not in BUILT_IN


def say_network(model: str) -> str:
    """A network in words; the user's own has a name that may be long."""
    return {"mlp": "fully connected", "cnn": "convolutional"}.get(model, "your network")
