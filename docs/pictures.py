"""The pictures of the gallery that no command has written into the docs: `anynorm explain`, and a report of `compare`.

They are made once, in build/pictures; remove the folder to have them made again.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path("build/pictures")
COMPARE = (
    "compare --data digits --model mlp --norms none,batch,layer --batch-sizes 32,8 --images 512 --seeds 3"
    " --rates 0.01,0.1 --minutes 1"
)
PLOT = re.compile(r'<div role="img" aria-label="([^"]*)">(<svg.*?</svg>)', re.DOTALL)


def run(*arguments: str) -> str:
    """One command of the program, and what it printed."""
    code = "from anynorm.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


def compare() -> None:
    """A report, and each of its plots as a file that the gallery includes."""
    for _ in range(6):  # Each goes on where the last one ended: on a busy machine a minute may be too short.
        if "No full run is finished yet" not in run(*COMPARE.split(), "--out", str(FOLDER / "compare")):
            break
    report = (FOLDER / "compare" / "report.html").read_text(encoding="utf-8")
    lines = []
    for number, (words, svg) in enumerate(PLOT.findall(report)):
        (FOLDER / f"compare-{number}.svg").write_text(svg, encoding="utf-8")
        lines += [f".. image:: ../build/pictures/compare-{number}.svg", f"   :alt: {html.unescape(words)}", ""]
    (FOLDER / "compare.rst").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """All of them, unless they are there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, options in {"explain": [], "explain-resnet18": ["--mine", "resnet18"]}.items():
        if not (FOLDER / f"{name}.svg").exists():
            run("explain", *options, "--out", str(FOLDER / f"{name}.svg"))
    if not (FOLDER / "compare.rst").exists():
        compare()


if __name__ == "__main__":
    main()
