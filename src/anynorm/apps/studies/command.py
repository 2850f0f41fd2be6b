"""What `anynorm study run` was asked for, read and checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anynorm.errors import UserError

from .compare.options import Options, read_items, read_norm


@dataclass(frozen=True)
class StudyOptions:
    """What the command was asked for; None stands for what each study has of its own."""

    quick: bool = False
    full: bool = False
    seeds: int | None = None
    minutes: float | None = None
    data: str | None = None
    model: str | None = None
    norms: tuple[str, ...] | None = None
    out: Path = Path("anynorm-studies")

    @property
    def command(self) -> str:
        """What repeats it, after the name of the study."""
        values = {"seeds": self.seeds, "data": self.data, "model": self.model, "norms": ",".join(self.norms or ())}
        words = [f"--{name} {value}" for name, value in values.items() if value]
        return " ".join([*(["--quick"] if self.quick else []), *(["--full"] if self.full else []), *words])


def read_study_norms(text: str) -> tuple[str, ...]:
    """Norms from their text on the command line."""
    try:
        return tuple(read_norm(item) for item in read_items("--norms", text, "norms", "none,batch,group"))
    except UserError as problem:
        raise UserError(str(problem).replace("compare", "study run", 1)) from None


def run_named(names: Sequence[str], options: StudyOptions) -> int:
    """Run the studies of these names, or all; the exit code."""
    from .compare.compare import compare, process_start
    from .find import find_studies
    from .run import run_studies

    started = process_start()
    if "compare" in names:
        if len(names) > 1:
            raise UserError("study run compare: runs alone; give the other studies a command of their own.")
        return compare(find_comparison(options), started=started)
    return run_studies(find_studies(None if "all" in names else names), options, started=started)


def find_comparison(options: StudyOptions) -> Options:
    """The comparison with what was asked of it; the rest as `anynorm compare` has it."""
    if options.full:
        raise UserError("study run compare --full: there is no published size of it; leave it out.")
    asked = {
        "data": options.data,
        "models": options.model and (options.model,),
        "norms": options.norms,
        "seeds": options.seeds,
        "minutes": options.minutes or (1 / 3 if options.quick else None),
    }
    return Options(**{name: value for name, value in asked.items() if value}, out=options.out)  # type: ignore[arg-type]
