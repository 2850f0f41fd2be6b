"""Says which random numbers are used."""

from fuzz.drive import ROUNDS, SECONDS, SEED


def pytest_report_header() -> str:
    return f"fuzz: FUZZ_SEED={SEED} FUZZ_SECONDS={SECONDS:g} for each test, FUZZ_ROUNDS={ROUNDS}"
