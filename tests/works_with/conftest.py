"""The tests here want the packages that `make works-with` installs; the scripts beside them are no tests."""

from importlib.util import find_spec

if find_spec("torchvision"):
    import works_with.vision  # noqa: F401 # lightning and transformers import torchvision

collect_ignore_glob = ["with_*.py", "vision.py", "ranks.py", "models.py"]
