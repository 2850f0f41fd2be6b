"""A folder with models and data to name on the command line."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from anynorm.cli import app

MODELS = '''
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)

def train(model):
    """By hand: an optimizer of torch's imports its compiler, which takes seconds."""
    for _ in range(10):
        for x, y in load():
            loss = nn.functional.cross_entropy(model(x), y)
            for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
                p.data.sub_(0.1 * gradient)
    return model

def healthy(): return train(build()).eval()

def shifted():
    """Averages of other data: worse in evaluation."""
    model = healthy()
    model[1].running_mean.add_(3 * model[1].running_var.sqrt())
    return model

def taken_over():
    """The same with a momentum as of Keras, and a bias before the norm."""
    model = shifted()
    model[1].momentum = 0.99
    model[0].bias = nn.Parameter(torch.ones(16))
    model[1].running_mean.add_(1)
    return model

def inverted(): return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=0.99))
def several(): return nn.Sequential(*[nn.BatchNorm1d(4, momentum=0.99) for _ in range(3)])
def several_names(): return nn.ModuleDict({name: nn.BatchNorm1d(4, momentum=0.99) for name in ("a", "b")})
def notes(): return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
def lazy(): return nn.LazyBatchNorm1d()
def number(): return 3
def talks():
    print("a word of the model's")
    return notes()

def load():
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(8):
        y = torch.randint(0, 3, (32,), generator=generator)
        found.append((torch.randn(32, 6, generator=generator) + y[:, None], y))
    return found

BATCHES = load()
def wrong_width(): return [(torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))]
def dataset(): return torch.utils.data.TensorDataset(*BATCHES[0])
def one_batch(): return BATCHES[0]
def tensor(): return BATCHES[0][0]
def empty(): return []
def breaks(): raise RuntimeError("no such disk")
def breaks_later():
    yield BATCHES[0]
    raise RuntimeError("no such file")
def half(outputs, targets): return 0.5 * nn.functional.cross_entropy(outputs, targets)
def bad_loss(outputs, targets): raise RuntimeError("no such class")
WORD = "a word"
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`anynorm doctor` in a folder with own_models.py; returns the result, whose exception is the user's error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sick.py").write_text(MODELS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *arguments: CliRunner().invoke(app, ["doctor", *arguments])
    torch.set_num_threads(threads)
