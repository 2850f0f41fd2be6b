"""Which task targets stand for, and what is refused."""

import numpy as np
import pytest

from anynorm.apps.studies.targets import find_targets
from anynorm.errors import UserError

N = 30
EYE = np.eye(3)[np.arange(N) % 3]
MANY = np.stack([np.arange(N) % 2, np.arange(N) % 3 == 0, np.ones(N) - (np.arange(N) % 5 == 0)], 1)
LOOKS = {
    "numbers": (np.arange(N) % 3 + 4, "classes", 3),
    "whole floats": ((np.arange(N) % 3).astype(float), "classes", 3),
    "words": (np.array(["a", "b"])[np.arange(N) % 2], "classes", 2),
    "bytes": (np.array([b"a", b"b"])[np.arange(N) % 2], "classes", 2),
    "bools": (np.arange(N) % 2 == 0, "classes", 2),
    "one-hot": (EYE, "classes", 3),
    "a column": ((np.arange(N) % 3)[:, None], "classes", 3),
    "labels": (MANY, "labels", 3),
    "fractions": (np.linspace(0, 1, N), "values", 1),
    "ids": (np.arange(N), "values", 1),
    "columns": (np.random.default_rng(0).normal(size=(N, 4)), "values", 4),
}


@pytest.mark.parametrize("case", LOOKS)
def test_targets_are_told_apart_by_their_looks(case):
    y, kind, outputs = LOOKS[case]
    found = find_targets("t", y, N)
    assert (found.kind, found.outputs) == (kind, outputs)
    assert found.y.shape == ((N,) if kind == "classes" else (N, outputs))
    assert found.y.dtype == {"classes": np.int64, "labels": np.float32, "values": np.float64}[kind]


def test_what_is_asked_for_counts_more_than_looks():
    assert find_targets("t", np.arange(N) % 5, N, "values").kind == "values"
    assert find_targets("t", EYE, N, "labels").kind == "labels"
    assert find_targets("t", np.arange(N) % 2, N, "labels").outputs == 1


BAD = {
    "fractions as classes": (np.linspace(0, 1, N), "classes", "give --task values"),
    "words as values": (np.array(["a", "b"])[np.arange(N) % 2], "values", "text can only be classes"),
    "numbers as labels": (np.arange(N) % 3, "labels", "0 and 1 for each label"),
    "labels as classes": (MANY, "classes", "--task labels where several may hold"),
    "a rare label": (np.stack([np.arange(N) == 0, np.arange(N) % 2], 1), "labels", "label 1 of 't' holds for 1"),
    "a constant": (np.stack([np.linspace(0, 1, N), np.ones(N)], 1), "values", "column 2"),
    "too few": (np.linspace(0, 1, 9), "values", "need 10 samples"),
    "a rare class": (np.array([7, 7] + [1] * 28), "auto", "class 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_targets_end_in_one_sentence(case):
    y, kind, said = BAD[case]
    with pytest.raises(UserError) as caught:
        find_targets("t", y, len(y), kind)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
