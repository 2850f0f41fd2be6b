"""The checks, a class each; `CHECKS` in `..check` finds them."""
