"""What does the monitor cost a training step of ResNet-18? With it and without, in turn, on one thread.

`python -m benchmarks.monitor` times a step that is not measured, one that is, and whole rounds of 50 steps, and prints
the share at the default `every`. `--healthy` trains ResNet-18 on the MNIST images with three seeds, and says what was
warned of, which should be nothing. `--picture` trains ResNet-18 on the MNIST images with one norm whose momentum is too
small, and writes docs/monitor.svg.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anynorm
from anynorm.apps.monitor.page import PANELS, draw_panel
from anynorm.apps.monitor.read import read_history
from anynorm.apps.studies.data import load_data
from anynorm.apps.timing.interleaved import InterleavedTimings, time_interleaved
from anynorm.apps.zoo import ResNet18

from .machine import Watch, describe_load, find_facts

PICTURE = Path(__file__).parents[1] / "docs" / "monitor.svg"
SECONDS = 60.0  # for a size
EVERY = 50
SIZES = ((8, 64), (16, 32))  # images, and their side


def make_step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A whole training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    target = torch.arange(len(x)) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def measure(x: Tensor, accelerated: bool, folder: str) -> InterleavedTimings:
    """Steps without a monitor, twice to know the machine by; with one that does not measure; with one that does."""
    torch.manual_seed(0)
    model = ResNet18(10)
    if accelerated:
        anynorm.accelerate(model)
    models = {name: copy.deepcopy(model) for name in ("without", "without again", "not measured", "measured")}
    monitors = [
        anynorm.Monitor(models["not measured"], f"{folder}/none.sqlite", every=10**9, warn=False, overwrite=True),
        anynorm.Monitor(models["measured"], f"{folder}/each.sqlite", every=1, warn=False, overwrite=True),
    ]
    calls = {name: make_step(each, x) for name, each in models.items()}
    found = time_interleaved(calls, SECONDS, fewest=15, most=400)
    for monitor in monitors:
        monitor.close()
    return found


def describe(found: InterleavedTimings) -> str:
    """A line: the step, the price of a measured one, and the share at every 50 steps."""
    step = found.median("without")
    low, high = found.interval("measured", "without")
    measured, idle = found.ratio("measured", "without") - 1, found.ratio("not measured", "without") - 1
    share = measured / EVERY
    return (
        f"step {1e3 * step:.1f} ms; measured +{1e3 * measured * step:.1f} ms, {100 * measured:.1f} % "
        f"({100 * low - 100:.1f} to {100 * high - 100:.1f}); not measured {100 * idle:+.2f} %, the same model again "
        f"{100 * found.ratio('without again', 'without') - 100:+.2f} %; every {EVERY}: {100 * share:.2f} %"
    )


def count_idle() -> float:
    """Microseconds of the hook in a step that is not measured, by a model that does nothing else."""
    model = nn.Sequential(nn.BatchNorm1d(1))
    del model[0]
    plain = copy.deepcopy(model)
    model.append(nn.BatchNorm1d(1))
    monitor = anynorm.Monitor(model, every=10**9)
    model(torch.randn(2, 1))  # the first is measured
    model(torch.randn(2, 1))
    del model[0]
    x = torch.zeros(1)
    found = time_interleaved({"with": lambda: model(x), "without": lambda: plain(x)}, 3.0)
    monitor.close()
    return 1e6 * (found.median("with") - found.median("without"))


def train(model: nn.Module, monitor: anynorm.Monitor, steps: int, rate: float) -> float:
    """On the MNIST images; the last loss."""
    data = load_data("mnist")
    images, labels = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    loss = torch.zeros(())
    with monitor:
        for _ in range(steps):
            chosen = torch.randint(len(images), (16,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chosen].expand(-1, 3, -1, -1)), labels[chosen])
            loss.backward()
            optimizer.step()
    return float(loss.detach())


def try_healthy() -> None:
    """Three seeds; what was warned of."""
    for seed in range(3):
        for every, rate in ((50, 0.05), (5, 0.01)):
            torch.manual_seed(seed)
            model = ResNet18(10)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loss = train(model, anynorm.Monitor(model, every=every), 300, rate)
            print(f"seed {seed}, every {every}, rate {rate}, last loss {loss:.2f}: {len(said)} warnings", flush=True)
            print(*(f"  {each.message}" for each in said), sep="\n", end="")


def draw_picture() -> None:
    """Train with one momentum that is too small, and draw the gap of every norm."""
    torch.manual_seed(0)
    model = ResNet18(10)
    model.get_submodule("layer2.0.bn1").momentum = 0.0005
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.sqlite"
        train(model, anynorm.Monitor(model, file, every=10), 400, 0.05)
        plot = draw_panel(read_history(file), PANELS[0])
    assert plot is not None
    PICTURE.write_text(plot.svg, encoding="utf-8")
    print(plot.alt_text)


def main() -> None:
    """Measure and print, or draw."""
    torch.set_num_threads(1)
    if "--picture" in sys.argv[1:]:
        draw_picture()
        return
    if "--healthy" in sys.argv[1:]:
        try_healthy()
        return
    watch = Watch()
    print(f"an idle hook: {count_idle():.2f} us")
    with tempfile.TemporaryDirectory() as folder:
        for images, side in SIZES:
            for accelerated in (False, True):
                found = measure(torch.randn(images, 3, side, side), accelerated, folder)
                norms = "anynorm" if accelerated else "torch"
                print(f"ResNet-18, {images} x 3 x {side}^2, norms of {norms}: {describe(found)}", flush=True)
    facts = find_facts()
    load = describe_load(watch.find_share())
    print(f"{facts['date']}, {facts['cpu']}, one thread, torch {facts['torch']}; other work meanwhile: {load}.")


if __name__ == "__main__":
    main()
