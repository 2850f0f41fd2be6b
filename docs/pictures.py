"""The pictures of the gallery that no command has written into the docs: those of `anynorm explain`.

They are made once, in build/pictures; remove the folder to have them made again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path("build/pictures")
PICTURES = {"explain": [], "explain-resnet18": ["--mine", "resnet18"]}


def main() -> None:
    """Make those that are not there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, options in PICTURES.items():
        path = FOLDER / f"{name}.svg"
        if not path.exists():
            code = "from anynorm.cli import main; main()"
            command = [sys.executable, "-c", code, "explain", *options, "--out", str(path)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
