"""What does exact recalibration cost? `anynorm.recalibrate` against torch's `update_bn`, in turn, on a ResNet-18.

`python -m benchmarks.recalibrate` prints the time of a pass over the same batches, and the number of passes that
``earlier="population"`` takes.
"""

from __future__ import annotations

import copy

import torch
from torch.optim.swa_utils import update_bn

import anynorm
from anynorm.apps.timing.interleaved import time_interleaved
from anynorm.apps.zoo import resnet18

from .machine import Watch, describe_load, find_facts

SECONDS = 30.0
BATCHES = 2


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    watch = Watch()
    theirs, x = resnet18()
    ours = copy.deepcopy(theirs)
    anynorm.accelerate(ours)
    x = x[:, :, :64, :64]
    data = [torch.randn_like(x) for _ in range(BATCHES)]
    calls = {
        "update_bn, torch norms": lambda: update_bn(data, theirs),
        "recalibrate, torch norms": lambda: anynorm.recalibrate(theirs, data),
        "update_bn, our norms": lambda: update_bn(data, ours),
        "recalibrate, our norms": lambda: anynorm.recalibrate(ours, data),
    }
    rounds = time_interleaved(calls, SECONDS, fewest=7)
    first = next(iter(calls))
    print(f"ResNet-18, {BATCHES} batches of {tuple(x.shape)}")
    for name in calls:
        print(f"  {name:26} {1e3 * rounds.median(name):7.0f} ms, {rounds.ratio(name, first):.2f} times")
    small = [x[:, :, :32, :32] for x in data]
    report = anynorm.recalibrate(copy.deepcopy(theirs), small, earlier="population")
    print(f"  earlier='population': {report.passes} passes")
    facts = find_facts()
    load = describe_load(watch.find_share())
    print(f"{facts['date']}, {facts['cpu']}, {facts['threads']} threads; other work meanwhile: {load}.")


if __name__ == "__main__":
    main()
