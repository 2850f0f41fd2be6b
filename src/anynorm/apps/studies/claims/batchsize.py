"""Does batch normalization suffer where few images share statistics, or where the batch size changes?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import anynorm

from ..fit import MOMENTUM, draw_order, evaluate, fit
from ..norms import NormFactory, ghosts, renorm_ghosts
from ..plots import COLOURS, MARKERS, dots
from ..study import Find, Published, Results, Setting, Study, Trial, Value, say_network, try_rates
from ..verdicts import Effect, Table, Verdict, conclude, difference, say_mean
from ..workers import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENOUGH = 0.5  # points of error: what group norm costs at 32 images in Wu and He, so that less is no reason to change
IMAGES, BATCH, SIZES = 1_000, 32, (32, 8, 4, 2)
LARGE, SMALL, PHASE, PHASES = 64, 4, 1_984, 3  # images; a phase is a whole number of batches of either size
RATES, SEARCH_SEED = (0.003, 0.01, 0.03), 1001
# With statistics over a part of SGD's batch: which norms at which sizes. Group and layer norm do not depend on them;
# renormalization takes five times as long as the others, and so has the smallest alone.
FULLY_CONNECTED: dict[str, tuple[int, ...]] = {
    "batch": SIZES,
    "renorm": SIZES[-2:],
    "group": (BATCH,),
    "layer": (BATCH,),
}
CONVOLUTIONAL: dict[str, tuple[int, ...]] = {"batch": SIZES, "group": (BATCH,)}
# Lines of the picture: arm, what is measured, look.
LINES = {
    "batch, running averages": ("batch", "error", {"color": COLOURS["batch"], "marker": MARKERS["batch"]}),
    "batch, recalibrated": ("batch", "recalibrated", {"color": "#e69f00", "marker": "^"}),
    "batch, statistics of N test images": ("batch", "by_batch", {"color": "#7f3c8d", "marker": "P"}),
    "batch renormalization": ("renorm", "error", {"color": "#cc79a7", "marker": "v"}),
    "group": ("group", "error", {"color": COLOURS["group"], "marker": MARKERS["group"]}),
    "layer": ("layer", "error", {"color": COLOURS["layer"], "marker": MARKERS["layer"]}),
}


def make_norm(arm: str, size: int) -> str | NormFactory:
    """The norm of an arm with statistics over `size` of SGD's 32 images."""
    if arm == "batch":
        return ghosts(size, BATCH)
    return renorm_ghosts(size, BATCH, PHASES * PHASE) if arm == "renorm" else arm


def list_cells(setting: Setting) -> list[dict[str, Value]]:
    """What is trained beside rates and seeds, the longest trainings first."""
    cells: list[dict[str, Value]] = []
    networks = setting.networks
    for network in networks:
        sizes = CONVOLUTIONAL if network == "cnn" and not setting.model else FULLY_CONNECTED
        for arm, size in [(arm, size) for arm, some in sizes.items() for size in sorted(some)]:
            cells.append({"network": network, "schedule": "fixed", "arm": arm, "size": size})
    for schedule, arm in product(("changed", "constant"), ("batch", "group")):
        cells.append({"network": networks[0], "schedule": schedule, "arm": arm, "size": LARGE})
    return cells


def plan(setting: Setting, find: Find) -> Iterable[Trial]:
    """Every cell's rate by validation loss, then its seeds."""
    phase, rates = (192, RATES[:1]) if setting.quick else (PHASE, RATES)
    for cell in list_cells(setting):
        fields: dict[str, Any] = {**cell, "phase": phase}
        rate, search = try_rates(find, [Trial.of(rate=r, seed=SEARCH_SEED, search=True, **fields) for r in rates])
        yield from search
        if rate is not None:
            yield from (Trial.of(rate=rate, seed=seed, **fields) for seed in range(setting.seeds))


def perform(trial: Trial, setting: Setting) -> Record:
    """Train with SGD on 32 images a step, or on 64, then 4 with a sixteenth of the rate, then 64 again; measure."""
    data, phase, changes = setting.data, trial["phase"], trial["schedule"] != "fixed"
    x, y = (torch.from_numpy(part)[:IMAGES] for part in (data.train_x, data.train_y))
    norm = trial.arm if changes else make_norm(trial.arm, trial["size"])
    network = setting.build(norm, trial.seed, trial["network"])
    optimizer = torch.optim.SGD(network.parameters(), trial.rate, MOMENTUM)
    record: Record = {}
    order = torch.from_numpy(draw_order(len(x), PHASES * phase, trial.seed))
    for number, images in enumerate(order.split(phase)):
        batch = (SMALL if number == 1 and trial["schedule"] == "changed" else LARGE) if changes else BATCH
        for group in optimizer.param_groups:
            group["lr"] = trial.rate * (batch / LARGE if changes else 1)
        record["status"] = fit(network, x, y, images.split(batch), optimizer)
        if record["status"] == "diverged":
            break
        if number == 1 and changes and not trial.search:
            record |= {f"{name}_between": value for name, value in measure(network, trial, setting).items()}
    if trial.search:
        found = evaluate(network, torch.from_numpy(data.validation_x), torch.from_numpy(data.validation_y))
        return {**record, "loss": found[1]}
    final = measure(network, trial, setting)
    # One that diverged before is measured as it is.
    return {**{f"{name}_between": value for name, value in final.items() if changes}, **record, **final}


def measure(network: nn.Module, trial: Trial, setting: Setting) -> dict[str, float]:
    """Test errors in percent: by running averages, and for batch norm recalibrated and by statistics of test images."""
    x, y = torch.from_numpy(setting.data.test_x), torch.from_numpy(setting.data.test_y)
    found = {"error": 100 * (1 - evaluate(network, x, y)[0])}
    if trial.arm == "batch":
        # Ghosts normalize by `size` test images each, the last of 500 by what is left.
        found["by_batch"] = 100 * (1 - evaluate(network, x, y, by_batch=True)[0])
        plain = setting.build("batch", trial.seed, trial["network"])
        plain.load_state_dict(network.state_dict())  # A ghost's state is batch norm's.
        found["recalibrated"] = found["error"]
        with contextlib.suppress(FloatingPointError):  # Where training diverged, nothing can be estimated.
            anynorm.recalibrate(plain, torch.from_numpy(setting.data.train_x)[:IMAGES].split(250), progress=False)
            found["recalibrated"] = 100 * (1 - evaluate(plain, x, y)[0])
    return found


def find_errors(results: Results, network: str, line: str, size: int) -> dict[int, float]:
    """Test errors by seed, for a line of the picture."""
    arm, key, _ = LINES[line]
    size = BATCH if arm in ("group", "layer") else size
    return results.values(key, network=network, schedule="fixed", arm=arm, size=size)


def find_change(results: Results, arm: str, key: str) -> dict[int, float]:
    """What changing the batch size costs, by seed."""
    changed, constant = (results.values(key, schedule=s, arm=arm) for s in ("changed", "constant"))
    return difference(changed, constant)


def judge(results: Results) -> Verdict:
    """What 2 images for each statistic cost against 32, and what a change costs batch norm more than group norm."""
    networks = results.setting.networks
    first, one = networks[0], 100 / len(results.setting.data.test_x)

    def cost(network: str, line: str) -> Effect:
        few, many = (find_errors(results, network, line, size) for size in (SIZES[-1], SIZES[0]))
        name = f"error at N = 2 less at 32, {say_network(network)}, {line}"
        return Effect(name, difference(few, many), ENOUGH, "points", one)

    def change(key: str, when: str) -> Effect:
        values = difference(*(find_change(results, arm, key) for arm in ("batch", "group")))
        name = f"cost of changing the batch size {when}, batch norm less group norm"
        return Effect(name, values, ENOUGH, "points", one)

    effects = [cost(first, "batch, running averages"), change("error_between", "from 64 to 4")]
    lines = ("batch, recalibrated", "batch, statistics of N test images")
    beside = [cost(first, line) for line in lines] + [cost(other, "batch, running averages") for other in networks[1:]]
    for line in ("batch renormalization", "group"):
        pair = (find_errors(results, first, each, SIZES[-1]) for each in ("batch, running averages", line))
        beside.append(Effect(f"error at N = 2, batch norm less {line}", difference(*pair), 0.0, "points", one))
    keys = ("error_between", "recalibrated_between")
    back = difference(*(results.values(key, schedule="changed", arm="batch") for key in keys))
    beside += [
        change("error", "to 4 and back to 64"),
        Effect("error after 64 to 4, batch norm, before less after recalibration", back, 0.0, "points", one),
    ]
    means = [interval.mean if (interval := effect.interval()) else float("nan") for effect in effects]
    sentence = (
        f"Statistics over 2 images instead of 32 cost batch norm {means[0]:+.1f} points of test error; going from "
        f"batches of 64 to 4 costs it {means[1]:+.1f} points more than group norm."
    )
    return conclude(sentence, effects, beside=beside, notes=say_notes(results), tables=write_tables(results, networks))


def say_notes(results: Results) -> list[str]:
    """Rates at an end of what was tried, and what diverged."""
    records = results.where(seed=0)
    ends = [name_cell(r) for r in records if r["rate"] in (RATES[0], RATES[-1])]
    bad = sorted({name_cell(record) for record in results.records if record["status"] == "diverged"})
    notes = [f"Rate at an end of those tried: {', '.join(ends)}."] if ends and not results.setting.quick else []
    return notes + ([f"Diverged in some trial: {', '.join(bad)}."] if bad else [])


def name_cell(record: Record) -> str:
    """A cell in a few words."""
    size = f"N = {record['size']}" if record["schedule"] == "fixed" else record["schedule"]
    return f"{say_network(record['network'])} {record['arm']} {size} ({record['rate']:g})"


def write_tables(results: Results, networks: list[str]) -> list[Table]:
    """Mean errors with half of their intervals."""
    rows = []
    for network, line in product(networks, LINES):
        cells = [say_mean(find_errors(results, network, line, size)) for size in SIZES]
        if any(cells):
            rows.append((f"{say_network(network)}: {line}", *cells))
    columns = list(product(("constant", "changed"), ("_between", "")))
    changes = []
    for arm, key in (("batch", "error"), ("batch", "recalibrated"), ("group", "error")):
        found = [results.values(f"{key}{moment}", schedule=schedule, arm=arm) for schedule, moment in columns]
        changes.append((f"{arm}, {key}", *map(say_mean, found)))
    heads = ("batches of", "64", "64, end", "64 to 4", "64 to 4 to 64, end")
    return [
        ("Test error, %, mean ± half of the 95 % interval", ("norm, N =", *map(str, SIZES)), rows),
        (f"The same where SGD's own batch changes, {say_network(networks[0])}", heads, changes),
    ]


def paint(results: Results, axes: Axes) -> None:
    """Errors against the images that share statistics, a part for each network, and what a change costs."""
    networks = results.setting.networks
    ticks: list[tuple[float, str]] = []
    for number, network in enumerate(networks):
        start = number * (len(SIZES) + 1.0)
        for index, (line, (_, _, look)) in enumerate(LINES.items()):
            values = [find_errors(results, network, line, size) for size in SIZES]
            places = [start + place + 0.08 * (index - 2.5) for place in range(len(SIZES))]
            if not number or any(values):
                dots(axes, values, line if not number else "", places=places, line="-", **look)
        ticks += [(start + place, str(size)) for place, size in enumerate(SIZES)]
        say_part(axes, start + 1.5, f"{say_network(network)}\nSGD 32, statistics over N")
    start = len(networks) * (len(SIZES) + 1.0)
    moments = [("constant", "error_between", "64"), ("changed", "error_between", "64→4")]
    moments += [("constant", "error", "64\nend"), ("changed", "error", "64→4→64\nend")]
    for index, (line, arm) in enumerate((("batch, running averages", "batch"), ("group", "group"))):
        values = [results.values(key, schedule=schedule, arm=arm) for schedule, key, _ in moments]
        places = [start + place + 0.16 * (index - 0.5) for place in range(len(moments))]
        dots(axes, values, "", places=places, **LINES[line][2])
    ticks += [(start + place, text) for place, (_, _, text) in enumerate(moments)]
    say_part(axes, start + 1.5, f"{say_network(networks[0])}\nSGD's own batch changes")
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.set(ylabel="test error, % (logarithmic)", xlabel="images that share statistics", yscale="log")
    axes.set_yticks((5, 10, 20, 50, 100), ("5", "10", "20", "50", "100"))
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def say_part(axes: Axes, place: float, text: str) -> None:
    """A heading over a part of the picture."""
    axes.text(place, 1.0, text, ha="center", va="bottom", transform=axes.get_xaxis_transform(), fontsize=9)


STUDY = Study(
    name="batchsize",
    title="Does batch normalization suffer where few images share statistics, or where the batch size changes?",
    claim="“Mini-batch size: BN depends on the size of the mini-batch for calculating the mean and variance, which may "
    "lead to inaccurate estimates for small mini-batches or in cases where the batch size must be changed during "
    "training.” (Limitations and Alternatives)",
    design="1,000 training images, six passes. First, SGD takes 32 images a step in every arm and only the images that "
    "share statistics change: N = 32, 8, 4 or 2, as with that many on each GPU; on a fully connected network, 3 x 100, "
    "and a convolutional one, 8 and 16 channels. Averages are over equally many images at any N. Second, SGD's own "
    "batch changes: 64 images for two passes, then 4, then 64 again, the rate in proportion, beside 64 throughout, "
    "with torch's momentum of averages, 0.1. Each arm has its own best of three rates, by validation loss.",
    rule="Confirmed if, on the fully connected network or the user's own, batch norm's test error at N = 2 is more "
    f"than {ENOUGH:g} points above that at 32, and going from 64 to 4 images costs it, before the batch grows again, "
    f"more than {ENOUGH:g} points more than it costs group norm. Refuted if one of them is below. Both intervals "
    "together 95 %.",
    published=(
        Published(
            "Wu and He 2018, arXiv:1803.08494, table 2",
            "ResNet-50, error in % at 32/16/8/4/2 images per GPU: batch 23.6/23.7/24.8/27.3/34.7, group "
            "24.1/24.2/24.0/24.2/24.1; batch renorm at 4: 26.3",
        ),
        Published(
            "EvalNorm 2019, abstract", "correcting inference alone brings back 6.18 points of the loss at 2 images"
        ),
    ),
    differs="Small networks, 1,000 small images and six passes. In the paper SGD's batch shrinks with the images per "
    "GPU; here it does not in the first part. The paper does not change the size during training.",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    refuses={"norms": "it compares batch norm's variants with group and layer norm"},
    size=(10.0, 4.8),
)
