"""From numbers to a verdict: one rule for all studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .intervals import CONFIDENCE, Interval, find_interval, share_confidence

CONFIRMED, REFUTED, INCONCLUSIVE = "confirmed", "refuted", "inconclusive"


# Title, heads and rows.
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Effect:
    """A difference that is measured seed by seed, and the threshold that it must pass.

    Attributes:
        name: what less what, in words: `accuracy, batch less none`.
        values: by seed, one for each pair.
        threshold: the claim needs an effect above it; fixed before the run.
        unit: of values and threshold; % and × are common.
        least: the standard deviation counts as this much at least. Where measurement moves in steps, equal differences
            over few seeds may be chance: give one test sample for accuracies, and for places on a grid the step over
            the square root of 6, which is what rounding both sides to the grid gives a difference.
    """

    name: str
    values: Mapping[int, float]
    threshold: float = 0.0
    unit: str = ""
    least: float = 0.0

    def interval(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Mean with its t-interval."""
        return find_interval(list(self.values.values()), self.least, confidence)

    def outcome(self, confidence: float = CONFIDENCE) -> str:
        """Confirmed with the whole interval above the threshold, refuted below it, else inconclusive."""
        interval = self.interval(confidence)
        if interval is None or interval.low is None or interval.high is None:
            return INCONCLUSIVE
        if interval.low > self.threshold:
            return CONFIRMED
        return REFUTED if interval.high < self.threshold else INCONCLUSIVE


@dataclass(frozen=True)
class Verdict:
    """What a study found.

    Attributes:
        outcome: confirmed, refuted or inconclusive.
        sentence: the finding in one sentence, with its numbers.
        effects: what decided, together at 95 %.
        beside: what was looked at and decides nothing, each at 95 %.
        notes: more sentences, such as what diverged.
        confidence: of each deciding interval.
        tables: (title, heads, rows) for the page.
    """

    outcome: str
    sentence: str
    effects: tuple[Effect, ...] = ()
    beside: tuple[Effect, ...] = ()
    notes: tuple[str, ...] = ()
    confidence: float = CONFIDENCE
    tables: tuple[Table, ...] = ()


def decide(effects: Sequence[Effect]) -> str:
    """Confirmed where every effect is, refuted where one is, else inconclusive.

    Intervals hold together at 95 %, so that a verdict against the truth comes at most once in twenty studies, and
    with one true effect of zero at threshold zero once in twenty altogether, half of it on each side.
    """
    outcomes = [effect.outcome(share_confidence(len(effects))) for effect in effects]
    if REFUTED in outcomes:
        return REFUTED
    return CONFIRMED if outcomes and all(outcome == CONFIRMED for outcome in outcomes) else INCONCLUSIVE


def conclude(
    sentence: str,
    effects: Sequence[Effect],
    *,
    beside: Sequence[Effect] = (),
    notes: Sequence[str] = (),
    tables: Sequence[Table] = (),
) -> Verdict:
    """The verdict that the effects give by `decide`."""
    shared = share_confidence(len(effects))
    return Verdict(decide(effects), sentence, tuple(effects), tuple(beside), tuple(notes), shared, tuple(tables))


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """First less second, over the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def say_effect(effect: Effect, confidence: float = CONFIDENCE, *, decides: bool = True) -> str:
    """An effect with its interval in words, and its threshold where it decides."""
    interval = effect.interval(confidence)
    if interval is None:
        return f"{effect.name}: nothing measured"
    unit = f" {effect.unit}" if effect.unit else ""
    if interval.low is None or interval.high is None:
        return f"{effect.name}: {interval.mean:+.3g}{unit}, one seed, no interval"
    said = (
        f"{effect.name}: {interval.mean:+.3g}{unit} ({interval.low:+.3g} to {interval.high:+.3g}, {interval.seeds} "
        f"seeds, {100 * confidence:.3g} %)"
    )
    return f"{said}, needs more than {effect.threshold:.3g}" if decides else said


def say_mean(values: Mapping[int, float], digits: int = 1) -> str:
    """Mean and half of the 95 % interval of values by seed; empty where there are none."""
    interval = find_interval(list(values.values()))
    if interval is None:
        return ""
    half = "" if interval.high is None else f" ± {interval.high - interval.mean:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"
