"""Packages that only some commands need: looked for before any work, and named with the extra that brings them."""

from collections.abc import Sequence
from importlib.util import find_spec

from anynorm.errors import UserError

# As pyproject.toml has them, each by the name that it is imported by.
EXTRAS = {"compare": ("matplotlib", "scipy", "mlxtend", "sklearn"), "files": ("pyarrow", "safetensors")}


def check_installed(command: str, packages: Sequence[str]) -> None:
    """Refuse what needs packages that are not installed.

    Args:
        command: what the user asked, for the message: compare.
        packages: by the names that they are imported by; each of some extra.

    Raises:
        UserError: one is missing; the message says which extra brings it.
    """
    for package in packages:
        if find_spec(package) is None:
            extra = next(name for name, brought in EXTRAS.items() if package in brought)
            raise UserError(f"{command} needs {package}, which is not installed; pip install 'anynorm[{extra}]'.")
