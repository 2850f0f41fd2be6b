"""The one place of the version: the wheel, `anynorm --version` and `anynorm env` read it here."""

__version__ = "0.1.0"
