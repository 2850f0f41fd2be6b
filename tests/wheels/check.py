"""Is an installed wheel whole? `check.py README.md`; with --no-compiler it must also have found no compiler.

The kernels must be in use, the version must be the wheel's, and the quick start of the README must run.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def main(readme: Path) -> None:
    """Check all, and say what was found."""
    for compiler in ("cc", "c++", "gcc", "g++", "clang") if "--no-compiler" in sys.argv else ():
        assert shutil.which(compiler) is None, f"{compiler} is in PATH: that the wheel needs none was not tried"
    command = Path(sys.executable).with_name("anynorm")
    facts = json.loads(subprocess.run([command, "env", "--json"], check=True, capture_output=True, text=True).stdout)
    assert not facts["kernels"].startswith("off"), facts["kernels"]
    assert facts["anynorm"] == version("anynorm")
    printed = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    assert printed == f"anynorm {version('anynorm')}\n"
    text = readme.read_text(encoding="utf-8")
    block = re.search(r"^## Quick start$.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    exec(compile(block[1], "README.md, Quick start", "exec"), {})
    import anynorm

    assert "site-packages" in anynorm.__file__, anynorm.__file__
    print(f"works: {facts}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
