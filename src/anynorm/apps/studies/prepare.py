"""What a study is run on: options that fit it, data, the user's network, and all that identifies one of its trials."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from anynorm.apps.terminal import say
from anynorm.errors import UserError

from . import data, fit, models, norms, study
from .command import StudyOptions
from .data import load_data
from .describe import find_machine, find_versions
from .models import find_model
from .study import Setting, Study

QUICK_SEEDS = 2


def choose_fitting(studies: Sequence[Study], options: StudyOptions, console: Console) -> tuple[Sequence[Study], int]:
    """(studies for which the options make sense, exit code so far); of several, the others are named and left out."""
    fitting, code = [], 0
    for each in studies:
        try:
            check_options(each, options)
            fitting.append(each)
        except UserError as problem:
            if len(studies) == 1:
                raise
            say(console, f"Left out: {problem}")
            code = 2
    return fitting, code


def check_options(study: Study, options: StudyOptions) -> None:
    """Raise where an option makes no sense for a study."""
    if options.full and not study.has_published_size:
        raise UserError(f"study run {study.name} --full: there is no published size of it; leave it out.")
    given = {"data": options.data, "model": options.model, "norms": options.norms}
    for name, value in given.items():
        if value is not None and name in study.refuses:
            raise UserError(f"study run {study.name} --{name}: {study.refuses[name]}; leave it out.")


def prepare(study: Study, options: StudyOptions) -> tuple[Setting, dict[str, Any]]:
    """What a study is run on, what identifies a trial beside its fields, and what the report tells of it."""
    try:
        found = load_data(options.data or study.data)
        model = None
        if options.model is not None:
            model = find_model(options.model, found.sample_shape, found.classes)
            check_model(options.model, found)
    except UserError as problem:
        raise UserError(str(problem).replace("compare", f"study run {study.name}", 1)) from problem
    seeds = options.seeds or (QUICK_SEEDS if options.quick else study.seeds)
    setting = Setting(found, seeds, options.model, options.norms, options.quick, options.full)
    versions = find_versions()
    identity = {
        "study": study.name,
        "sources": find_digest(study),
        "data": found.fingerprint,
        "model": model and model.fingerprint,
        "norms": options.norms,
        "size": [options.quick, options.full],
        "versions": {name: versions[name] for name in ("anynorm", "torch")},
    }
    shown = {
        "seeds": seeds,
        "data": f"{found.name}: {len(found.train_x):,} training, {len(found.validation_x):,} validation and "
        f"{len(found.test_x):,} test samples of shape {found.sample_shape}",
        "versions": versions,
        "machine": find_machine(),
    }
    return setting, {"identity": identity, "shown": shown}


def check_model(model: str, found: data.Data) -> None:
    """Raise where the user's network cannot be trained on the data, or is the same with every norm."""
    from .compare.check import find_impossible
    from .compare.plan import Plan
    from .task import Task

    find_impossible(Plan((model,), ("none", "batch"), ("8",), (0.1,), 1, 64), Task(found))


def find_digest(each: Study) -> str:
    """Digest of a study's own file and of all that it takes from here: after a change, thresholds too, it runs anew."""
    module = inspect.getmodule(each.perform)
    names = {getattr(value, "__module__", None) for value in vars(module).values()} if module else set()
    shared = {str(name) for name in names if str(name).startswith(f"{__package__}.")}
    shared |= {found.__name__ for found in (data, fit, models, norms, study)}
    files = [inspect.getsourcefile(each.perform), *(sys.modules[name].__file__ for name in sorted(shared))]
    whole = hashlib.sha256()
    for file in dict.fromkeys(files):
        whole.update(Path(str(file)).read_bytes())
    return whole.hexdigest()
