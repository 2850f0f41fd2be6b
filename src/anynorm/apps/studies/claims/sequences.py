"""Is batch normalization unfit for sequences of varying length? Padding counted, masked, per step, and layer norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..fit import draw_batches, evaluate, fit
from ..plots import COLOURS, dots
from ..sequence_models import EVALUATION_BATCH, MOST, Reader, SequenceNetwork, choose_norm, watch_padding
from ..study import Find, Published, Results, Setting, Study, Trial, try_rates
from ..verdicts import Effect, Table, Verdict, conclude, difference
from ..vowels import find_lengths
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NONE, COUNTED, LEAST, MASKED = "none", "batch counting padding", "batch counting least padding", "batch masked"
STEP, LAYER = "batch per step", "layer"
# What stands in the network.
NORMS: dict[str, dict[str, str | None]] = {
    "conv": {NONE: "none", COUNTED: "counted", LEAST: "counted", MASKED: "masked", LAYER: "layer"},
    "gru": {
        NONE: None,
        COUNTED: "counted",
        LEAST: "counted",
        MASKED: "batch-sequence",
        STEP: "batch-per-step",
        LAYER: "layer",
    },
}
ARMS = tuple((network, norm) for network, norms in NORMS.items() for norm in norms)
RATES = (0.01, 0.03, 0.1)  # of Adam
BATCH, STEPS, SEARCH_SEED = 30, 100, 1001
COST, MOVED, ROUNDING = 1.0, 0.1, 1e-5  # points of accuracy; of a logit
MARKERS = {NONE: "x", COUNTED: "o", LEAST: "P", MASKED: "^", STEP: "v", LAYER: "s"}
NEVER = 1e-8  # where a change of 0 stands


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Each arm's rate by validation loss, then the seeds."""
    steps, rates = (10, RATES[:1]) if setting.quick else (STEPS, RATES)
    for network, norm in ARMS:
        trials = [Trial.of(norm, rate, SEARCH_SEED, search=True, network=network, steps=steps) for rate in rates]
        rate, search = try_rates(find, trials)
        yield from search
        if rate is not None:
            yield from (Trial.of(norm, rate, seed, network=network, steps=steps) for seed in range(setting.seeds))


def perform(trial: Trial, setting: Setting) -> Record:
    """Train, test on batches padded to their longest, then pad the test utterances further."""
    data, norm = setting.data, NORMS[trial["network"]][trial.arm]
    torch.manual_seed(trial.seed)
    inside = choose_norm(str(norm)) if trial["network"] == "conv" else norm
    network = SequenceNetwork(data.sample_shape, data.classes, inside)
    held_out = (data.validation_x, data.validation_y) if trial.search else (data.test_x, data.test_y)
    if setting.quick:
        held_out = (held_out[0][: 2 * EVALUATION_BATCH], held_out[1][: 2 * EVALUATION_BATCH])
    x, test_x = torch.from_numpy(data.train_x), torch.from_numpy(held_out[0])
    most = None if trial.arm == LEAST else MOST
    train = Reader(network, x, torch.from_numpy(find_lengths(data.train_x)), most, trial.seed)
    test = Reader(network, test_x, torch.from_numpy(find_lengths(held_out[0])))
    batches = draw_batches(len(x), BATCH, trial["steps"], trial.seed)
    optimizer = torch.optim.Adam(network.parameters(), trial.rate)
    status = fit(train, torch.arange(len(x)), torch.from_numpy(data.train_y), batches, optimizer)
    labels = torch.from_numpy(held_out[1])
    accuracy, loss = evaluate(test, torch.arange(len(labels)), labels, batch=EVALUATION_BATCH)
    record = {"status": status, "accuracy": 100 * accuracy, "loss": loss}
    return record if trial.search else record | watch_padding(test)


def compare(results: Results, network: str, first: str, second: str, threshold: float = 0.0) -> Effect:
    """Test accuracy of one norm less another's."""
    values = [results.values("accuracy", network=network, arm=norm) for norm in (first, second)]
    one = 100 / len(results.setting.data.test_x)
    return Effect(f"accuracy, {network}: {first} less {second}", difference(*values), threshold, "points", one)


def find_changes(results: Results, network: str, norm: str) -> dict[int, float]:
    """By seed, the largest change of a logit by further padding in either mode."""
    keys = ("evaluation", "training")
    records = results.where(network=network, arm=norm)
    return {r["seed"]: max(float("inf") if r[key] is None else r[key] for key in keys) for r in records}


def judge(results: Results) -> Verdict:
    """What counted padding costs and moves, and whether telling the norm the lengths lifts it."""
    costs = [compare(results, network, MASKED, COUNTED, COST) for network in NORMS]
    both = [find_changes(results, network, COUNTED) for network in NORMS]
    logs = {seed: float(np.log10(np.clip(min(c[seed] for c in both), 1e-9, 1e9))) for seed in both[0].keys() & both[1]}
    name = "log10 of the largest change of a logit, padding counted, in the network where it is less"
    effects = [*costs, Effect(name, logs, float(np.log10(MOVED)))]
    beside = [compare(results, network, LAYER, COUNTED) for network in NORMS]
    beside += [compare(results, network, MASKED, LEAST) for network in NORMS]
    beside += [compare(results, "gru", STEP, MASKED)]
    beside += [compare(results, network, MASKED, NONE) for network in NORMS]
    largest = {norm: max_change(results, norm) for norm in (COUNTED, MASKED)}
    means = [float(np.mean(list(effect.values.values()) or [np.nan])) for effect in costs]
    sentence = (
        f"Batch norm that counts padding moves logits by up to {largest[COUNTED]:.3g}; told the lengths it gains "
        f"{means[0]:+.1f} points of accuracy in the convolutional network and {means[1]:+.1f} in the GRU."
    )
    lifted = "is lifted" if largest[MASKED] < ROUNDING else "is not lifted"
    notes = [
        f"The limit {lifted} by masks: further padding moves logits of masked batch norm by {largest[MASKED]:.0e}."
    ]
    diverged = [r for r in results.where() if r["status"] == "diverged"]
    if diverged:
        notes.append(f"Diverged: {', '.join(sorted({r['network'] + ': ' + r['arm'] for r in diverged}))}.")
    return conclude(sentence, effects, beside=beside, notes=notes, tables=[tabulate(results)])


def max_change(results: Results, norm: str) -> float:
    """The largest change over networks and seeds."""
    return max((c for network in NORMS for c in find_changes(results, network, norm).values()), default=0.0)


def tabulate(results: Results) -> Table:
    """Accuracy and largest changes of every arm."""
    keys = ("evaluation", "training", "alone")
    rows = []
    for network, norm in ARMS:
        records = results.where(network=network, arm=norm)
        changes = [max((np.inf if r[key] is None else r[key] for r in records), default=np.nan) for key in keys]
        accuracy = np.mean([r["accuracy"] for r in records]) if records else np.nan
        cells = ["0" if c == 0 else f"{c:.0e}" if c < 0.01 else f"{c:.2f}" for c in changes]
        rows.append([f"{network}: {norm}", f"{records[0]['rate']:g}" if records else "", f"{accuracy:.1f}", *cells])
    return (
        "Largest change by further padding: of a logit in both modes, of the norms' own output",
        ["network", "rate", "accuracy, %", "evaluation mode", "training mode", "norm alone"],
        rows,
    )


def paint(results: Results, axes: Axes) -> None:
    """Accuracy over the largest change of a logit; 0 stands at the left end."""
    for network, norm in ARMS:
        changes = find_changes(results, network, norm)
        if not changes:
            continue
        place = float(np.clip(max(changes.values()), NEVER, 1e3))
        colour = COLOURS.get(norm.partition(" ")[0], COLOURS["batch"])
        look = {"marker": MARKERS[norm], "color": colour, "markerfacecolor": colour if network == "conv" else "white"}
        # Beside each other where they are equal.
        place *= 1 + 0.25 * list(NORMS[network]).index(norm)
        dots(
            axes, [results.values("accuracy", network=network, arm=norm)], f"{network}: {norm}", places=[place], **look
        )
    axes.axvspan(ROUNDING, 1e3, color="#d55e00", alpha=0.06, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlim(NEVER / 2, 300)
    ticks = [NEVER, 1e-6, 1e-4, 1e-2, 1, 100]
    axes.set_xticks(ticks, ["0", *(f"{tick:g}" for tick in ticks[1:])])
    axes.minorticks_off()
    axes.set(xlabel=f"largest change of a logit, same utterances padded to {MOST} steps", ylabel="test accuracy, %")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


STUDY = Study(
    name="sequences",
    title="Is batch normalization unfit for sequences of varying length?",
    claim="“Sequence data and recurrent networks: BN may not be well-suited for sequence data or recurrent neural "
    "networks (RNNs), where the length of the input sequences can vary.” (Limitations and Alternatives)",
    design="Utterances of nine speakers, 7 to 29 steps of 12 channels, are classified by a convolutional network and a "
    "GRU with no norm, batch norm that counts padding, batch norm that is told the lengths (in the GRU over all steps, "
    f"or for each step), and layer norm. Training batches are padded to a random length of up to {MOST} steps, since "
    "recordings elsewhere vary more than these, and test batches to their longest. A first design padded training "
    "batches to their longest, too; it was dropped because no difference of accuracy was seen, and stands beside as "
    "“counting least padding”. Then the same test utterances are padded further, in evaluation mode and with the "
    "statistics of the batch. Where there is no norm, padding is 0 behind each convolution.",
    rule=f"Confirmed for naive batch norm if, in both networks, counting the padding costs more than {COST:g} point of "
    f"test accuracy against being told the lengths, and further padding moves a logit by more than {MOVED:g}. Refuted "
    "if one of the three is below. The three intervals hold together at 95 %. Whether masks lift the limit is said "
    f"beside: they do if no logit moves by more than {ROUNDING:g}.",
    published=(
        Published(
            "Cooijmans et al. 2016, arXiv:1603.09025",
            "zero padding “biases the batch mean and variance”; with statistics for each step batch norm helps an "
            "LSTM: permuted MNIST 95.4 against 90.2",
        ),
        Published("Laurent et al. 2015, arXiv:1510.01378", "statistics over the batch and all steps that are there"),
    ),
    differs="Small networks, 210 training utterances, and padding of random length; the papers train on long sequences "
    "and on text.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    data="vowels",
    seeds=5,
    refuses={
        "data": "it needs sequences of unlike lengths, which it takes from the aeon package",
        "model": "its networks are told the lengths, which a network of yours is not",
        "norms": "it compares ways to treat padding",
        "full": "there is no published size of it",
    },
    size=(9.0, 4.2),
)
