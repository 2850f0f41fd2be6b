"""Keeps invariants: masked padding reaches no norm, counted padding does, and the verdict follows the numbers."""

import importlib.util

import numpy as np
import pytest
import torch

from anynorm.apps.studies.claims.sequences import ARMS, COUNTED, LAYER, LEAST, MASKED, STEP, STUDY
from anynorm.apps.studies.data import Data, load_data
from anynorm.apps.studies.sequence_models import MOST, Reader
from anynorm.apps.studies.study import Setting, Trial
from anynorm.apps.studies.vowels import find_lengths
from anynorm.errors import UserError


def make_sequences(count, seed):
    """Sequences of 3 channels and 4 to 12 steps, 0 behind; the class is the channel that is high."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 3, count)
    x = generator.standard_normal((count, 3, 12)).astype(np.float32)
    x[np.arange(count), y] += 1
    lengths = generator.integers(4, 13, count)
    return np.where(np.arange(12) < lengths[:, None, None], x, 0).astype(np.float32), y


@pytest.fixture(scope="module")
def setting():
    parts = [part for seed, count in enumerate((90, 30, 60)) for part in make_sequences(count, seed)]
    return Setting(Data("made up", *parts, classes=3, fingerprint=""), 5)


@pytest.mark.parametrize(("network", "norm"), ARMS)
def test_padding_reaches_only_norms_that_count_it(setting, network, norm):
    record = STUDY.perform(Trial.of(norm, 0.01, 0, network=network, steps=6), setting)
    assert record["status"] == "finished" and record["accuracy"] > 100 / 3
    if norm in (COUNTED, LEAST):
        assert record["alone"] > 0.1 and record["training"] > 0.01
    else:
        assert record["alone"] == 0 and record["training"] < 1e-5 and record["evaluation"] < 1e-5
    # The convolution behind the norm reads its beta at the end, in evaluation too; a GRU reads nothing behind it.
    assert (record["evaluation"] > 1e-3) == (network == "conv" and norm in (COUNTED, LEAST))


def test_a_search_does_not_look_at_the_test(setting):
    record = STUDY.perform(Trial.of(LAYER, 0.01, 1001, search=True, network="conv", steps=2), setting)
    assert set(record) == {"status", "accuracy", "loss"}


def test_training_batches_are_padded_to_random_lengths_and_equal_seeds_to_equal_ones():
    seen = []

    def network(x, lengths):
        seen.append(x.shape[2])
        return x.sum((1, 2))

    x = make_sequences(40, 0)[0]
    for seed in (0, 0, 1):
        reader = Reader(network, torch.from_numpy(x), torch.from_numpy(find_lengths(x)), MOST, seed)
        for _ in range(20):
            reader(torch.arange(10))
    assert seen[:20] == seen[20:40] != seen[40:]
    assert min(seen) >= 9 and 60 < max(seen) <= MOST


@pytest.mark.parametrize(("cost", "outcome"), [(4.0, "confirmed"), (-3.0, "refuted"), (1.2, "inconclusive")])
def test_the_verdict_follows_from_what_counting_costs(setting, conclude, cost, outcome):
    def invent(trial):
        wobble = np.random.default_rng([trial.seed, len(trial.arm)]).normal(0, 0.5)
        counted = trial.arm in (COUNTED, LEAST)
        change = 5.0 if counted else 1e-6 if trial["network"] == "conv" else 0.0
        return {
            "accuracy": 95 + wobble - cost * counted - 2 * (trial.arm == STEP),
            "evaluation": 0.0,
            "training": change,
            "alone": change if counted else 0.0,
        }

    verdict = conclude(STUDY, setting, invent)
    assert verdict.outcome == outcome, verdict
    assert "The limit is lifted by masks" in verdict.notes[0]
    assert len(verdict.tables[0][2]) == len(ARMS)


def test_a_claim_whose_logits_do_not_move_is_refuted(setting, conclude):
    def invent(trial):
        return {
            "accuracy": 95 - 5 * (trial.arm == COUNTED) + trial.seed % 2,
            "evaluation": 0,
            "training": 0,
            "alone": 0,
        }

    assert conclude(STUDY, setting, invent).outcome == "refuted"


def test_networks_that_diverged_are_named_and_judged(setting, conclude):
    def invent(trial):
        bad = trial.arm == MASKED and trial["network"] == "gru"
        status = "diverged" if bad else "finished"
        changes = dict.fromkeys(("evaluation", "training", "alone"), None if bad else 0.5)
        return {"status": status, "accuracy": 10.0 if bad else 90.0 + trial.seed % 2, **changes}

    verdict = conclude(STUDY, setting, invent)
    assert verdict.outcome == "refuted"
    assert "is not lifted" in verdict.notes[0] and verdict.notes[1] == "Diverged: gru: batch masked."


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vowels is read from the aeon package, which is not installed; run pip"):
        load_data("vowels")


@pytest.mark.skipif(
    importlib.util.find_spec("aeon") is None, reason="needs the data of aeon: pip install --no-deps aeon"
)
def test_the_utterances_are_whole_and_standardized():
    data = load_data("vowels")
    assert [len(x) for x in (data.train_x, data.validation_x, data.test_x)] == [210, 60, 370]
    lengths = find_lengths(data.test_x)
    assert (lengths.min(), lengths.max(), data.classes) == (7, 29, 9)
    real = data.train_x.swapaxes(1, 2)[np.arange(29) < find_lengths(data.train_x)[:, None]]
    np.testing.assert_allclose(real.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(real.std(0), 1, atol=1e-5)
