"""How a study was done and what it cannot say: the last part of the report."""

from __future__ import annotations

from html import escape
from typing import Any

from anynorm.apps.terminal import join_words

from ..fit import MOMENTUM
from .judge import NEGLIGIBLE, WORKING_SHARE, Findings, plain_sizes
from .plan import FIRST_SHARE, FIRST_STEPS, SECOND_RATES, SECOND_SHARE
from .sentences import say_batch
from .train import HOPELESS_LOSS


def write_method(findings: Findings, results: dict[str, Any]) -> str:
    """How it was done, with every choice that a reader could dispute."""
    plan, versions = findings.plan, results["versions"]
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
        "Training": f"Plain SGD with momentum {MOMENTUM}, constant learning rate, cross-entropy, no augmentation and "
        f"no weight decay. A full run sees {plan.images:,} images, rounded down to whole batches.",
        "Pairing": "For a given seed every norm has the same initial weights and the same order of images; the "
        "differences are taken seed by seed.",
        "Learning rates": f"{', '.join(f'{rate:g}' for rate in plan.rates)}; the same grid and rule for every norm. "
        f"All get a short run ({100 * FIRST_SHARE:g} % of the images, {FIRST_STEPS} steps at least, or the whole "
        f"run, where that is shorter), the best {SECOND_RATES} another ({100 * SECOND_SHARE:g} % of the images) where "
        f"that is longer, on seed 0; the best validation accuracy wins, the lower loss where equal. {search}. A short "
        f"run is dropped a quarter through where its loss is still above {HOPELESS_LOSS:g} times that of guessing.",
        "Seeds": f"{plan.seeds} planned, numbered from 0.",
        "Judging": "Paired differences of test accuracy with 95 % t-intervals; their standard deviation counts as one "
        f"test sample ({100 / findings.test_samples:.2g} points) at least, because equal differences over few seeds "
        f"may be chance. A learning rate works where its short run reaches {100 * WORKING_SHARE:.0f} % of the best "
        "validation accuracy of any norm there. The verdict names a norm where it leads, or is not clearly worse and "
        f"less than {NEGLIGIBLE:g} point behind. Where no leader is clearly better than none, it names a norm that is, "
        "if there is one.",
        "Drift": f"Inputs of the last dense or convolutional layer ({'; '.join(sorted(probed)) or 'none found'}).",
        "Data": f"{results['options']['data']}, samples of shape {tuple(results['sample_shape'])}, "
        f"{results['classes']} classes; split class by class with a fixed seed; standardized with the training part.",
        "Machine": f"{results['machine']['system']}, {results['machine']['cores']} cores, "
        f"{results['machine']['torch_threads_per_run']} torch thread per run, two runs at once; torch "
        f"{versions['torch']}, numpy {versions['numpy']}, Python {versions['python']}.",
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in rows.items())
    return f"<section><h2>How it was done</h2><dl>{listed}</dl></section>\n"


def say_limits(findings: Findings, results: dict[str, Any]) -> list[str]:
    """What the numbers cannot say."""
    plan, test = findings.plan, results["data_sizes"][2]
    limits = [
        f"Runs are short: {plan.images / results['data_sizes'][0]:.1f} passes over the training samples. A norm that "
        "is slower at first may be ahead after more training.",
        "Each interval stands for itself. With many comparisons about one in twenty would miss 0 by chance alone.",
        f"Intervals cover the start and the order of images, not the choice of the {test:,} test samples; on these "
        f"alone an accuracy of 95 % is uncertain by about {100 * 1.96 * (0.95 * 0.05 / test) ** 0.5:.1f} points; "
        "differences between networks on the same samples are so less.",
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
