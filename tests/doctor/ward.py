"""The sick ward: for every check who has the disease, and who only looks like it."""

from importlib import import_module

from anynorm.doctor.check import OWN
from doctor.patients import Case

CASES: dict[str, Case] = {case.check: case for name in OWN for case in import_module(f"doctor.cases.{name}").CASES}
