"""What the examples in docstrings may use."""

import pytest
import torch

import anynorm


@pytest.fixture(autouse=True)
def names_for_doctests(doctest_namespace):
    doctest_namespace.update(anynorm=anynorm, torch=torch)
