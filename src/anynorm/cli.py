"""`python -m anynorm.cli`: the command line, which is written in `apps.cli`."""

from .apps.cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
