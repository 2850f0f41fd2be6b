"""The sick ward: for every check who has the disease, and who only looks like it."""

from importlib import import_module

from doctor.patients import Case

FILES = (
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
CASES: dict[str, Case] = {case.check: case for name in FILES for case in import_module(f"doctor.cases.{name}").CASES}
