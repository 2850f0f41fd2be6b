"""The sentences of `anynorm try`: what was measured, its cause and its remedy, in plain words."""

from anynorm.apps.terminal import join_words
from anynorm.apps.timing.steps import PairedTimings
from anynorm.doctor.dependence import Finding

UNLIKE = 0.02  # of the ratio: from here on a reader who divides the medians finds another one
_OTHER_RATIO = (
    "the two medians above, each of its own column, have the ratio {:.2f}: the machine's speed changed between pairs, "
    "within a pair it did not"
)


def describe_speed(timing: PairedTimings) -> list[tuple[str, str]]:
    """Return (label, text) lines: the two medians, then the ratio with its spread and the verdict."""
    from statistics import median

    low, high = timing.middle_half
    spread = f"{timing.ratio:.2f} times the speed, the median over pairs (half of them: {low:.2f} to {high:.2f})"
    medians = median(timing.before), median(timing.after)
    apart = abs(medians[0] / medians[1] / timing.ratio - 1) > UNLIKE
    surely_above, surely_below = timing.interval
    if surely_above > 1.0:
        verdict = "faster, on this model and machine"
    elif surely_below < 1.0:
        verdict = "slower, on this model and machine"
    else:
        verdict = "no difference that this measurement can tell from noise"
    if timing.is_noisy:
        verdict += "; the machine was busy: repeat" + (" with --threads 1" if timing.threads > 1 else "")
    return [
        ("before", f"{1e3 * medians[0]:.2f} ms"),
        ("after", f"{1e3 * medians[1]:.2f} ms"),
        ("ratio", f"{spread}; {_OTHER_RATIO.format(medians[0] / medians[1])}" if apart else spread),
        ("verdict", verdict),
    ]


def describe_finding(finding: Finding, topic: str) -> list[str]:
    """Return the answer, then, where there is one, the reason and the remedy.

    Args:
        finding: what was measured in one mode.
        topic: "samples" for the other samples of the batch, "padding" for padded positions.
    """
    if finding.change is None:
        return [f"not tested: {finding.note}"]
    if not finding.depends:
        answer = "no" if finding.change == 0 else f"no (rounding: {finding.change:.0e})"
        return [answer]
    answer = f"yes, by up to {_percent(finding.change)} of the largest output"
    if finding.note:
        answer += f" ({finding.note})"
    return [answer, *_reasons(finding, topic)]


def _reasons(finding: Finding, topic: str) -> list[str]:
    """Return why, and what helps."""
    if not finding.kinds:
        return [_NOT_THE_NORMS[topic]]
    names = join_words(finding.kinds)
    reason = _BY_NORMS[topic].format(names=names, takes="takes" if len(finding.kinds) == 1 else "take")
    if finding.only_norms:
        return [reason, _REMEDY[topic]]
    if finding.custom:
        custom, has = join_words(finding.custom), "has" if len(finding.custom) == 1 else "have"
        rest = f"Whether another layer does it too cannot be told: {custom} {has} code of its own."
    else:
        rest = (
            f"With those statistics held fixed {_percent(finding.remaining or 0.0)} remain: another layer does it too."
        )
    return [reason, rest, _REMEDY[topic]]


_BY_NORMS = {
    "samples": "Why: {names} {takes} mean and variance over the whole batch.",
    "padding": "Why: {names} {takes} mean and variance over padding, too.",
}
_NOT_THE_NORMS = {
    "samples": "Why: not its batch, instance or group norms; another layer joins the samples.",
    "padding": "Why: not its batch, instance or group norms; attention, pooling or a convolution reads the padding. "
    "Remedy: give that layer a mask.",
}
_REMEDY = {
    "samples": "Remedy: larger batches lessen it; layer or group norm end it.",
    "padding": "Remedy: batch sequences of like length, or use layer norm over features.",
}


def _percent(share: float) -> str:
    """Return a share as per cent with about two digits; tiny ones as powers of ten."""
    if share < 1e-4:
        return f"{share:.0e}"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
