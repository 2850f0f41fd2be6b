"""What a name on the command line stands for: every form of factory, and a sentence for each that does not work."""

import pytest
import torch
from torch import nn

from anynorm.apps.models.load import load_model
from anynorm.doctor.call import find_tensors
from anynorm.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "shapes", "guessed"),
    [
        ("plain", [(8, 7)], True),
        ("READY", [(8, 7)], True),
        ("Many", [(8, 4)], True),
        ("pair", [(3, 7)], False),
        ("attribute", [(6, 7)], False),
        ("several", [(2, 4), (2, 5)], False),
        ("named", [(3, 7)], False),
    ],
)
def test_every_form_of_factory_works(models, name, shapes, guessed):
    target = load_model(models + name)
    assert [tuple(tensor.shape) for tensor in target.call.tensors()] == shapes
    assert target.guessed == guessed
    assert find_tensors(target.call.of(target.model))


def test_a_dotted_module_is_found_in_the_working_folder(models):
    assert load_model("own_models:pair").call.describe() == "3x7 float32"


class FixedSize(nn.Sequential):
    """A vision model that, as many do, takes 224 by 224 only."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 32, 32), nn.Flatten(), nn.Linear(4 * 49, 3), nn.BatchNorm1d(3))


class Swap(nn.Module):
    """Exchange positions and features."""

    def forward(self, x):
        return x.transpose(1, 2)


class Last(nn.Module):
    """Keep the output of an LSTM."""

    def forward(self, pair):
        return pair[0]


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (8, 3, 64, 64)),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 2)), (8, 1, 28, 28)),
        (FixedSize, (8, 3, 224, 224)),
        (lambda: nn.Sequential(nn.Conv1d(6, 4, 3), nn.InstanceNorm1d(4)), (8, 6, 64)),
        (lambda: nn.Sequential(Swap(), nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)), (8, 32, 6)),
        (lambda: nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6)), (8, 32)),
        (lambda: nn.Sequential(nn.LSTM(5, 4, batch_first=True), Last(), nn.LayerNorm(4)), (8, 32, 5)),
        (lambda: nn.Conv3d(2, 3, 3), (8, 2, 16, 32, 32)),
        (lambda: nn.LayerNorm((4, 5)), (8, 4, 5)),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(32)), (8, 32, 6)),
        (lambda: nn.Linear(4, 2, dtype=torch.float64), (8, 4)),
    ],
)
def test_a_workable_input_is_found(monkeypatch, factory, shape):
    monkeypatch.setattr("anynorm.apps.models.load.ZOO", {"own": factory})
    (example,) = load_model("own").call.args
    assert tuple(example.shape) == shape


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("own_models", "is neither a built-in model"),
        ("nowhere:model", "importing nowhere raised ModuleNotFoundError: No module named 'nowhere'; run it in"),
        ("broken_import:model", "raised ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("own_models:missing", "own_models has no attribute 'missing'; it has plain, pair"),
        ("own_models:CONSTANT", "is an int and cannot be called"),
        ("own_models:number", "returned an int where a torch.nn.Module was expected"),
        ("own_models:broken", "raised RuntimeError: no weights found"),
        ("own_models:asks", "missing 1 required positional argument"),
        ("own_models:wrong_example", "refuses its example input (3x8 float32): RuntimeError"),
        ("own_models:wrong_kind", "give a tensor, a tuple of arguments or a dict"),
        ("own_models:Impossible", "let the factory return (model, example_input)"),
    ],
)
def test_a_bad_target_is_one_sentence(models, spec, sentence):
    with pytest.raises(UserError) as error:
        load_model(spec)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_lazy_layers_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(
        "anynorm.apps.models.load.ZOO", {"own": lambda: nn.Sequential(nn.LazyLinear(4), nn.LayerNorm(4))}
    )
    with pytest.raises(UserError, match="call the model once before returning it"):
        load_model("own")
