"""What a check is: a few lines that look for one fault; what it finds; and which checks there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import UserError

if TYPE_CHECKING:
    from .facts import Facts

Severity = Literal["error", "warning", "note"]
Need = Literal["model", "optimizer", "data"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
NEEDS: tuple[Need, ...] = ("model", "optimizer", "data")
GROUP = "anynorm.checks"  # of entry points: each names a class of checks
OWN = (
    "averages",
    "variances",
    "parameters",
    "modes",
    "optimizers",
    "structure",
    "places",
    "gap",
    "batches",
    "numbers",
    "dependence",
)
PAGE = "docs/doctor.md"
Evidence = dict[str, float | int | str]


@dataclass(frozen=True)
class Repair:
    """A change that removes what was found.

    Attributes:
        code: what to paste to do the same; it speaks of ``model``, and where it must of ``optimizer`` and ``loader``.
        perform: does it to the model that was examined.
        is_exact: outputs in evaluation must stay as they are, but for rounding.
        needs_training: the model computes something else afterwards and has to be trained for it: no loss is compared.
    """

    code: str
    perform: Callable[[], object]
    is_exact: bool = False
    needs_training: bool = False


@dataclass(frozen=True)
class Effect:
    """Something measured with and without what was found.

    Attributes:
        measure: its name: loss, accuracy, outputs.
        before, after: with the fault, and without it.
        better: whether less of it is better.
    """

    measure: str
    before: float
    after: float
    better: Literal["lower", "higher"] = "lower"

    @property
    def improves(self) -> bool:
        """Whether it is better without the fault."""
        return self.after < self.before if self.better == "lower" else self.after > self.before

    def __str__(self) -> str:
        return f"{self.measure} {self.before:.4g} -> {self.after:.4g}"


@dataclass
class Finding:
    """A fault at a place.

    Attributes:
        check: the id of the check that found it.
        title: the check's, in a line.
        severity: ``"error"`` (results are wrong), ``"warning"`` (they suffer, or will) or ``"note"``.
        layer: the module's name in the model; "" for the model as a whole.
        message: what was found, in a sentence.
        evidence: its numbers, by name.
        advice: what to do.
        repair: a change that removes it; None where only the user can.
        effects: what was measured with the fault and without it.
    """

    check: str
    title: str
    severity: Severity
    layer: str
    message: str
    evidence: Evidence = field(default_factory=dict)
    advice: str = ""
    repair: Repair | None = None
    effects: list[Effect] = field(default_factory=list)
    apply_to: Callable[[Finding], list[Effect]] | None = field(default=None, repr=False, compare=False)

    def apply(self) -> list[Effect]:
        """Perform the repair on the model that was examined, and prove it.

        Returns:
            What was measured before and after, where there were data.

        Raises:
            UserError: it has no repair.
            NotProved: it is found again, outputs moved that should not, or the loss rose; the model is as it was.
        """
        if self.repair is None or self.apply_to is None:
            raise UserError(
                f"apply: {self.check} must have a repair; got one that only you can make; "
                f"{self.advice or 'see ' + PAGE}"
            )
        return self.apply_to(self)


class Check:
    """One fault that norms may have; a subclass gives the attributes and `run`.

    Attributes:
        id: short, in lower case with hyphens; unique.
        title: the fault in a line.
        severity: of its findings, unless one says otherwise.
        needs: ``"model"`` alone, also the ``"optimizer"``, or ``"data"`` that the model was called with.
        fault: what is wrong then, and how it shows, for the page of checks.
        evidence: what is measured.
        cure: what to do.
        threads: where people asked about it.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    severity: ClassVar[Severity] = "warning"
    needs: ClassVar[Need] = "model"
    fault: ClassVar[str]
    evidence: ClassVar[str]
    cure: ClassVar[str]
    threads: ClassVar[tuple[str, ...]] = ()

    def run(self, facts: Facts) -> Iterable[Finding]:
        """Look for the fault."""
        raise NotImplementedError

    def find(
        self,
        layer: str,
        message: str,
        *,
        advice: str = "",
        severity: Severity | None = None,
        repair: Repair | None = None,
        effects: Iterable[Effect] = (),
        **evidence: float | int | str,
    ) -> Finding:
        """A finding of this check."""
        said = advice or self.cure
        return Finding(
            self.id, self.title, severity or self.severity, layer, message, evidence, said, repair, list(effects)
        )


@cache
def find_checks() -> dict[str, Check]:
    """Every check by its id: those of this package, and those that others bring by entry point.

    Raises:
        UserError: an entry point that is no check, cannot be loaded, or has the id of another.
    """
    for name in OWN:
        import_module(f".checks.{name}", __package__)
    places = {f"{__package__}.checks.{name}": place for place, name in enumerate(OWN)}
    own = [kind for kind in list_subclasses(Check) if kind.__module__ in places]
    # Whoever imported one of the files before has not changed the order.
    found = {kind.id: kind() for kind in sorted(own, key=lambda kind: places[kind.__module__])}
    for kind in load_others():
        if kind.id in found:
            raise UserError(f"checks: every check must have an id of its own; got {kind.id!r} twice; rename one")
        found[kind.id] = kind()
    return found


def list_subclasses(kind: type[Check]) -> Iterator[type[Check]]:
    """All classes below one that have an id."""
    for each in kind.__subclasses__():
        if "id" in vars(each):
            yield each
        yield from list_subclasses(each)


def load_others() -> Iterator[type[Check]]:
    """The checks of other packages."""
    for point in entry_points(group=GROUP):
        try:
            kind = point.load()
        except Exception as problem:
            said = f"checks: the entry point {point.name!r} ({point.value}) cannot be loaded; got {problem!r}"
            raise UserError(f"{said}; repair or uninstall that package") from problem
        check_kind(kind, f"the entry point {point.name!r}")
        yield kind


def check_kind(kind: object, source: str) -> None:
    """Refuse what is no check."""
    if not (isinstance(kind, type) and issubclass(kind, Check)):
        raise UserError(f"checks: {source} must name a subclass of anynorm.doctor.check.Check; got {kind!r}")
    missing = [each for each in ("id", "title", "fault", "evidence", "cure") if not hasattr(kind, each)]
    if missing or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", kind.id) or kind.severity not in SEVERITIES:
        lack = f"no {', '.join(missing)}" if missing else f"id {kind.id!r}, severity {kind.severity!r}"
        raise UserError(
            f"checks: {source} must have an id such as 'my-check', title, fault, evidence, cure; got {lack}"
        )
