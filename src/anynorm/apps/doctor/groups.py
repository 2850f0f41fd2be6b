"""Findings of one check together: where they are, what was measured, and one piece of code for all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from anynorm.apps.terminal import show_controls
from anynorm.doctor.check import Finding

SHARED = ("model.", "anynorm.", "optimizer")  # how lines begin that are for the whole model, once


@dataclass(frozen=True)
class Group:
    """What one check found at one severity.

    Attributes:
        findings: at least one, in the order of the model.
    """

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        """The first, which speaks for the others."""
        return self.findings[0]

    @property
    def key(self) -> str:
        """A name for it, unique among the groups of a diagnosis."""
        return f"{self.first.check}-{self.first.severity}"

    @property
    def layers(self) -> list[str]:
        """Where, each once."""
        return list(dict.fromkeys(finding.layer for finding in self.findings))

    @property
    def advice(self) -> list[str]:
        """What to do, each advice once."""
        return list(dict.fromkeys(finding.advice for finding in self.findings if finding.advice))

    @property
    def numbers(self) -> dict[str, list[float]]:
        """Evidence in numbers, by name; of the findings that have it."""
        found: dict[str, list[float]] = {}
        for finding in self.findings:
            for name, value in finding.evidence.items():
                if isinstance(value, int | float):
                    found.setdefault(name, []).append(float(value))
        return found

    @property
    def words(self) -> dict[str, list[str]]:
        """Evidence in words, by name, in the parts that the check gives it."""
        found: dict[str, list[str]] = {}
        for finding in self.findings:
            for name, value in finding.evidence.items():
                if isinstance(value, str) and value and name != "others":  # which `shares` reads
                    known = found.setdefault(name, [])
                    known += [each for each in value.split("; ") if each not in known]
        return found

    @property
    def shares(self) -> dict[str, float]:
        """What each layer alone costs of the loss, where that was measured; the largest first."""
        first = self.first
        own = first.evidence.get("loss_of_this_layer")
        if not isinstance(own, int | float):
            return {}
        found = {first.layer: float(own)}
        for part in str(first.evidence.get("others", "")).split("; "):
            name, _, number = part.rpartition(" ")
            with suppress(ValueError):
                found["" if name == "the model" else name] = float(number)
        return found

    @property
    def code(self) -> str:
        """The repairs of all findings as one piece of code; "" where there is none."""
        codes = {finding.layer: finding.repair.code for finding in self.findings if finding.repair is not None}
        if len(set(codes.values())) <= 1:
            return next(iter(codes.values()), "")
        loops = {replace_name(code, layer) for layer, code in codes.items()}
        if len(loops) == 1 and None not in loops:
            return write_loop(str(loops.pop()), list(codes))
        return "\n".join(dict.fromkeys(codes.values()))


def make_groups(findings: Iterable[Finding]) -> list[Group]:
    """Put together what one check found at one severity; the order stays."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        found.setdefault((finding.severity, finding.check), []).append(finding)
    return [Group(tuple(each)) for each in found.values()]


def replace_name(code: str, layer: str) -> str | None:
    """Code with the variable ``name`` for a layer's name; None where it does not name it, or has such a variable."""
    quoted = repr(layer)
    return None if quoted not in code or re.search(r"\bname\b", code) else code.replace(quoted, "name")


def write_loop(code: str, layers: list[str]) -> str:
    """A loop over layers; what is for the whole model comes once, after it."""
    lines = code.splitlines()
    last = len(lines)
    while last > 1 and lines[last - 1].startswith(SHARED) and not re.search(r"\bname\b", lines[last - 1]):
        last -= 1
    names = fill([f"{layer!r}," for layer in layers], 76)
    inner = "".join(f"    {line}\n" for line in lines[:last])
    return f"for name in (\n{names}):\n{inner}" + "\n".join(lines[last:])


def fill(words: list[str], width: int) -> str:
    """Words on as few lines as they need, none broken."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "".join(f"    {line}\n" for line in lines)


def write_number(value: float | int | str) -> str:
    """A number in three digits; whole ones in full, up to a million."""
    if isinstance(value, str):
        return value
    whole = math.isfinite(value) and value == int(value) and abs(value) < 1e6
    return f"{int(value):,}" if whole else f"{value:.3g}"


def write_range(values: list[float]) -> str:
    """The values of several norms: one, or from the smallest to the largest."""
    low, high = min(values), max(values)
    return write_number(low) if low == high or low != low else f"{write_number(low)} to {write_number(high)}"


def write_key(name: str) -> str:
    """The name of a piece of evidence, in words."""
    return name.replace("_", " ")


def in_line(text: str) -> str:
    """Text that came from a model, on one line and with nothing in it that steers."""
    return show_controls(text.replace("\n", "\\n"))


def write_layer(layer: str) -> str:
    """A layer's name, for people."""
    return in_line(layer) or "the model"


def shorten(text: str, most: int) -> str:
    """Text in so many characters at most: its end tells more."""
    return text if len(text) <= most else f"...{text[3 - most :]}"
