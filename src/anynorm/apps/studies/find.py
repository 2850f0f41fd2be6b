"""The studies by their names: those of this package, and those that others bring as entry points `anynorm.studies`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points

from anynorm.errors import UserError

from .study import Study

# In the order of the source document's claims, then what it does not say, then two published experiments.
CLAIMS = (
    "speed",
    "noise",
    "init",
    "covshift",
    "batchsize",
    "leak",
    "sequences",
    "alternatives",
    "shift",
    "ioffe2015",
    "cooijmans2016",
)
GROUP = "anynorm.studies"


def find_studies(names: Sequence[str] | None = None) -> list[Study]:
    """The studies of these names, in this order; all that are known where none is named.

    Raises:
        UserError: an unknown name, or an entry point that does not give a study.
    """
    brought = {point.name: point for point in entry_points(group=GROUP)}
    known = [*CLAIMS, *(name for name in sorted(brought) if name not in CLAIMS)]
    found = []
    for name in known if names is None else dict.fromkeys(names):
        if name in CLAIMS:
            found.append(import_module(f".claims.{name}", __package__).STUDY)
        elif name in brought:
            found.append(load_brought(name, brought[name]))
        else:
            near = difflib.get_close_matches(name.lower(), known, 1)
            raise UserError(
                f"study run: takes names out of {', '.join(known)}, or all; got {name!r}; "
                f"{f'did you mean {near[0]}?' if near else 'anynorm study list shows what each asks.'}"
            )
    return found


def load_brought(name: str, point: object) -> Study:
    """A study that another package brings."""
    try:
        study = point.load()  # type: ignore[attr-defined] # an EntryPoint, whose class moved between Python versions
    except Exception as problem:  # another package may raise anything
        raise UserError(
            f"study {name}: the package that brings it does not load ({type(problem).__name__}: {problem}); "
            "repair or remove that package."
        ) from problem
    if not isinstance(study, Study):
        raise UserError(
            f"study {name}: the entry point in {GROUP!r} must name a Study; it names a {type(study).__name__}; see "
            "anynorm.apps.studies.study."
        )
    return study
