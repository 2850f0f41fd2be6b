"""How well the doctor's checks tell the sick from the healthy: `make ward`.

Every check is tried on its sick model and its lookalikes of tests/doctor, with several seeds, and all checks on healthy
models that are trained briefly. Exits with 1 where a disease is missed, or an error is found where there is none.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from doctor.healthy import LARGE, MAKERS, make_healthy
from doctor.patients import Case
from doctor.ward import CASES


def try_case(case: Case, seeds: int) -> tuple[int, list[str]]:
    """In how many seeds the sick layer was named and no other, and which lookalikes were found ill."""
    named, wrong = 0, []
    for seed in range(seeds):
        found = case.sick(seed).diagnose(case.check).findings
        named += [finding.layer for finding in found] == [case.layer]
        for name, make in case.lookalikes.items():
            wrong += [f"{name}, seed {seed}: {each.message}" for each in make(seed).diagnose(case.check).findings]
        if dist.is_initialized():
            dist.destroy_process_group()
    return named, wrong


def try_healthy(names: list[str], seeds: int) -> tuple[Counter[str], list[str], list[str]]:
    """How many healthy models each check found ill, which errors there were, and a line for each finding."""
    counts: Counter[str] = Counter()
    errors, said = [], []
    for name in names:
        for seed in range(seeds):
            findings = make_healthy(name, seed).diagnose().findings
            counts.update({finding.check for finding in findings})
            lines = [f"{name}, seed {seed}: {each.severity} {each.check}: {each.message}" for each in findings]
            said += lines
            errors += [line for line, each in zip(lines, findings, strict=True) if each.severity == "error"]
    return counts, errors, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="without the models of full size")
    parser.add_argument("checks", nargs="*", help="ids; all where none is given")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = {check: case for check, case in CASES.items() if not asked.checks or check in asked.checks}
    names = [] if asked.checks else [*MAKERS, *(() if asked.quick else LARGE)]
    counts, errors, said = try_healthy(names, asked.seeds)
    table = Table("check", "found", "lookalikes found ill", "healthy models found ill")
    failed = bool(errors)
    for check, case in cases.items():
        named, wrong = try_case(case, asked.seeds)
        tried, healthy = asked.seeds * len(case.lookalikes), asked.seeds * len(names)
        table.add_row(check, f"{named} of {asked.seeds}", f"{len(wrong)} of {tried}", f"{counts[check]} of {healthy}")
        failed |= named < asked.seeds or bool(wrong)
        said += [f"{check}: {each}" for each in wrong]
    console = Console(width=120)
    console.print(table)
    for line in said:
        console.print(line, markup=False)
    sys.exit(failed)


if __name__ == "__main__":
    main()
