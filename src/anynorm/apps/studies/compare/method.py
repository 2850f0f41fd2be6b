"""How a study was done and what it cannot say: the last part of the report."""

from __future__ import annotations

from html import escape
from typing import Any

from anynorm.apps.terminal import join_words

from ..intervals import LEAST_SEEDS
from .findings import NEGLIGIBLE, NEGLIGIBLE_SHARE, WORKING_SHARE, Findings, plain_sizes
from .plan import FIRST_SHARE, FIRST_STEPS, SECOND_RATES, SECOND_SHARE
from .sentences import say_batch
from .train import HOPELESS_LOSS


def write_method(findings: Findings, results: dict[str, Any]) -> str:
    """How it was done, with every choice that a reader could dispute."""
    plan, versions, learned = findings.plan, results["versions"], results["learned"]
    metric = findings.metric
    probed = {
        f"{cell[0]}: {record['probed_layer']}"
        for cell, found in findings.finals.items()
        for record in found.values()
        if record.get("probed_layer")
    }
    rungs = {say_batch(batch): join_words([f"{images:,}" for images, _ in plan.rungs(batch)]) for batch in plan.batches}
    search = "; ".join(f"{batch}: {images} images" for batch, images in rungs.items() if images)
    rows = {
        "Networks": "; ".join(f"{name}: {about.rstrip('.')}" for name, about in results["about"].items()),
        "Norms": "Placed on a layer's output, before the activation. Layer and RMS norm share statistics over "
        "channels and positions of one sample. none is the identity.",
        "Training": f"{learned['optimizer'][0].upper()}{learned['optimizer'][1:]}, constant learning rate, "
        f"{learned['loss']}, no augmentation. A full run sees {plan.images:,} images, rounded down to whole batches.",
        "Metric": say_metric(findings, learned["kind"]),
        "Pairing": "For a given seed every norm has the same initial weights and the same order of images; the "
        "differences are taken seed by seed.",
        "Learning rates": f"{', '.join(f'{rate:g}' for rate in plan.rates)}; the same grid and rule for every norm. "
        f"All get a short run ({100 * FIRST_SHARE:g} % of the images, {FIRST_STEPS} steps at least, or the whole "
        f"run, where that is shorter), the best {SECOND_RATES} another ({100 * SECOND_SHARE:g} % of the images) where "
        f"that is longer, on seed 0; the best validation {metric.name} wins, the lower loss where equal. {search}. A "
        f"short run is dropped a quarter through where its loss is still above {HOPELESS_LOSS:g} times that of "
        "guessing.",
        "Seeds": f"{plan.seeds} planned, numbered from 0.",
        "Judging": f"Paired differences of test {metric.name} with t-intervals that hold together at 95 % over all "
        f"pairs of norms at a batch size{say_resolution(findings)}; fewer "
        f"than {LEAST_SEEDS} seeds are not judged. Runs that diverged count with what their networks reached. A "
        f"learning rate works where its short run gets {100 * WORKING_SHARE:.0f} % of the way from guessing to the "
        f"best validation {metric.name} of any norm there. The verdict names a norm where it leads, or is not clearly "
        f"worse and less than {say_negligible(findings)} behind. Where no leader is clearly better than none, it names "
        "a norm that is, if there is one.",
        "Drift": f"Inputs of the last dense or convolutional layer ({'; '.join(sorted(probed)) or 'none found'}).",
        "Data": f"{results['options']['data']}, samples of shape {tuple(results['sample_shape'])}, "
        f"{learned['targets'] or results['classes']}; split {'class by class ' if learned['kind'] == 'classes' else ''}"
        f"with a fixed seed; {say_standardizing(results)}.",
        "Machine": f"{results['machine']['system']}, {results['machine']['cores']} cores, "
        f"{results['machine']['torch_threads_per_run']} torch thread per run, two runs at once; torch "
        f"{versions['torch']}, numpy {versions['numpy']}, Python {versions['python']}.",
    }
    if results["start"]:
        rows["Start"] = " ".join(results["start"])
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in rows.items())
    return f"<section><h2>How it was done</h2><dl>{listed}</dl></section>\n"


def say_metric(findings: Findings, kind: str) -> str:
    """What a run is judged by, and what guessing reaches."""
    metric = findings.metric
    if not metric.percent:
        text = (
            f"{metric.name}, the user's own; {'higher' if metric.higher else 'lower'} is better; values in the units "
            "of the file. A run for which it is no number counts with the worst score of any run, or of guessing."
        )
    else:
        text = {
            "classes": "Accuracy, the share of right answers.",
            "labels": "Mean AUC: over labels, how often a sample that has the label is ranked before one that has not.",
            "values": "R², the share of the variance that is explained, mean over values, each -100 % at least.",
        }[kind]
    if metric.guessing is None:
        return f"{text} What guessing reaches is not known, so whether a network learned anything is not judged."
    return (
        f"{text} Guessing reaches {metric.say(metric.guessing)}; a network has learned something where its interval is "
        f"better by more than {metric.write(metric.margin)}, which chance hardly gives on "
        f"{findings.test_samples:,} samples."
    )


def say_resolution(findings: Findings) -> str:
    """Why equal differences are not certain, where the metric moves in steps."""
    least = findings.metric.resolution(findings.test_samples)
    if not least:
        return ""
    unit = " points" if findings.metric.percent else ""
    return (
        f"; their standard deviation counts as one test sample ({least:.2g}{unit}) at least, because equal differences "
        "over few seeds may be chance"
    )


def say_negligible(findings: Findings) -> str:
    """Which difference is no reason to prefer a norm."""
    return f"{NEGLIGIBLE:g} point" if findings.metric.percent else f"{100 * NEGLIGIBLE_SHARE:g} % of the leader's score"


def say_standardizing(results: dict[str, Any]) -> str:
    """What was done to the samples."""
    options = results["options"]
    if options.get("tokens"):
        return "token ids as they are"
    if options.get("standardize") is False:
        return "taken as it is"
    values = ", the values too" if results["learned"]["kind"] == "values" else ""
    return f"standardized with the training part{values}"


def say_limits(findings: Findings, results: dict[str, Any]) -> list[str]:
    """What the numbers cannot say."""
    plan, test = findings.plan, results["data_sizes"][2]
    limits = [
        f"Runs are short: {plan.images / results['data_sizes'][0]:.1f} passes over the training samples. A norm that "
        "is slower at first may be ahead after more training.",
        "Each network and batch size stands for itself, and so does each interval of a mean: of many, about one in "
        "twenty misses the truth by chance alone.",
        f"Intervals cover the start and the order of images, not the choice of the {test:,} test samples"
        f"{say_error(results)}.",
        "The learning rate was chosen from short runs of one seed. A different rate may suit a norm in longer runs.",
        "The time of a run depends on what else the machine does; compare seconds only roughly.",
    ]
    edges = find_edges(findings)
    if edges:
        limits.insert(
            0,
            f"The chosen learning rate is the smallest or largest of the grid for {join_words(edges)}; a better one "
            "may lie outside it. Widen --rates to see.",
        )
    sizes = plain_sizes(plan)
    if len(sizes) > 1:
        limits.append(
            f"Every batch size sees the same number of images, so batch {sizes[-1]} takes "
            f"{int(sizes[0]) / int(sizes[-1]):g} times as many steps as batch {sizes[0]}."
        )
    return limits


def say_error(results: dict[str, Any]) -> str:
    """How uncertain an accuracy is by the choice of test samples alone."""
    if results["metric"]["name"] != "accuracy":
        return ""
    error = 100 * 1.96 * (0.95 * 0.05 / results["data_sizes"][2]) ** 0.5
    return (
        f"; on these alone an accuracy of 95 % is uncertain by about {error:.1f} points; differences between networks "
        "on the same samples are so less"
    )


def find_edges(findings: Findings) -> list[str]:
    """Cells whose chosen rate is at an end of the grid."""
    rates = findings.plan.rates
    if len(rates) < 2:
        return []
    found: dict[str, list[str]] = {}
    for (model, batch, norm), rate in findings.rates.items():
        if findings.finals.get((model, batch, norm)) and rate in (rates[0], rates[-1]):
            found.setdefault(f"{model} at {say_batch(batch)}", []).append(norm)
    return [f"{where} ({', '.join(norms)})" for where, norms in found.items()]
