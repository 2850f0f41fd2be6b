"""What tests of several commands use: one thread, and a file of factories."""

import pytest
import torch

MODELS = """
import torch
from torch import nn

def plain(): return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
def pair(): return plain(), torch.randn(3, 7)
def several(): return nn.Bilinear(4, 5, 6), (torch.randn(2, 4), torch.randn(2, 5))
def named(): return plain(), {"input": torch.randn(3, 7)}
def without_norms(): return nn.Linear(3, 2)
def attribute():
    model = plain()
    model.example_input = torch.randn(6, 7)
    return model
def wrong_example(): return plain(), torch.randn(3, 8)
def wrong_kind(): return plain(), "a string"
def number(): return 3
def broken(): raise RuntimeError("no weights\\nfound")
def asks(width): return nn.Linear(width, 1)
class Impossible(nn.Module):
    def forward(self, first, second): return first
class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
    def forward(self, x):
        y = self.norm(x)
        return {"logits": y, "states": (y * 2, None)}
torch.manual_seed(5)
READY = plain()
CONSTANT = 3
"""


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine make these small models ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A file of factories in the working folder; returns the prefix that names it."""
    (tmp_path / "own_models.py").write_text(MODELS)
    (tmp_path / "broken_import.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    return "own_models.py:"
