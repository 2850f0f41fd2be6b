"""The scripts are no tests: `make works-with` runs them, in an environment with the packages they use."""

collect_ignore_glob = ["with_*.py", "vision.py"]
