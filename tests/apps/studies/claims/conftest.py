"""A small set of data, and studies judged on invented records."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from anynorm.apps.studies.data import split
from anynorm.apps.studies.study import Results, Setting


def make_setting(seeds=10, shape=(1, 8, 8), noise=1.0, **options):
    """Four classes of noisy images that a small network learns in a few steps."""
    generator = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 250)
    x = generator.standard_normal((4, *shape))[y] + noise * generator.standard_normal((len(y), *shape))
    return Setting(split("made up", x, y), seeds, **options)


@pytest.fixture(scope="session")
def setting():
    return make_setting()


@pytest.fixture(scope="session")
def make():
    return make_setting


@pytest.fixture
def conclude():
    """conclude(study, setting, invent): the verdict where invent(trial) measured it; the picture is drawn too."""

    def run(study, setting, invent):
        def find(trial):
            found = invent(trial)
            return found if found is None else {"status": "finished", "loss": trial.rate, **found}

        trials = list(dict.fromkeys(study.plan(setting, find)))
        results = Results(setting, trials, find)
        assert not results.missing
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = Figure(figsize=study.size, layout="constrained")
            study.paint(results, figure.add_subplot())
            figure.draw_without_rendering()
        return study.judge(results)

    return run
