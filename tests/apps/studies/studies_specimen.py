"""A study whose trials take no time unless `SPECIMEN_SECONDS` says so; CONTRIBUTING shows one like it."""

import os
import time

from anynorm.apps.studies.study import Published, Study, Trial
from anynorm.apps.studies.verdicts import Effect, conclude, difference


def plan(setting, find):
    arms = setting.norms or ("none", "batch")
    return [Trial.of(arm, 0.1, seed) for arm in arms for seed in range(setting.seeds)]


def perform(trial, setting):
    time.sleep(float(os.environ.get("SPECIMEN_SECONDS", "0")))
    if trial.arm == "instance":
        raise RuntimeError("instance is refused here")
    gain = 2.0 if trial.arm == "batch" else 0.0
    status = "diverged" if (trial.arm, trial.seed) == ("none", 1) else "finished"
    return {"status": status, "accuracy": gain + 0.1 * trial.seed * (trial.seed + 1)}


def judge(results):
    gain = difference(results.values("accuracy", arm="batch"), results.values("accuracy", arm="none"))
    return conclude("Batch norm gains <2> points.", [Effect("accuracy, batch less none", gain, 0.5, "points", 0.1)])


def paint(results, axes):
    for arm in ("none", "batch"):
        values = results.values("accuracy", arm=arm)
        axes.plot(list(values), list(values.values()), label=arm)
    axes.set(xlabel="seed", ylabel="accuracy, points")


STUDY = Study(
    name="specimen",
    title="Is <b>bold</b> shown as text?",
    claim="“$x$ & <i>hostile</i> names.”",
    design="Two arms with made-up accuracies.",
    rule="Confirmed if batch norm gains more than 0.5 points, refuted if it gains less.",
    published=(Published("Somebody 2015", "2 points"),),
    differs="everything",
    plan=plan,
    perform=perform,
    judge=judge,
    paint=paint,
    refuses={"model": "it has no network"},
)
