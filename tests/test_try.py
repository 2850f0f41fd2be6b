"""`anynorm try`: targets and examples are found, dependence is measured, nothing of the user's is changed."""

import random
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from anynorm.apps import cli
from anynorm.apps.models.call import Call, find_tensors
from anynorm.apps.models.load import load_model
from anynorm.apps.timing.steps import FEWEST_PAIRS, PairedTimings, time_steps
from anynorm.apps.try_model.accuracy import compare_outputs, largest_difference
from anynorm.apps.try_model.dependence import find_batch_dependence, find_padding_dependence
from anynorm.apps.try_model.sentences import describe_finding, describe_speed
from anynorm.apps.try_model.try_model import print_trial
from anynorm.errors import UserError
from anynorm.randomness import keep_randomness


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine make these small models ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A file of factories in the working folder; returns the prefix that names it."""
    (tmp_path / "own_models.py").write_text(MODELS)
    (tmp_path / "broken_import.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    return "own_models.py:"


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


def test_a_model_without_norms_is_no_error(models):
    ended = CliRunner().invoke(cli.app, ["try", models + "without_norms"])
    assert ended.exit_code == 0
    assert "no normalization layer" in ended.stdout


def test_the_users_model_and_random_state_stay(monkeypatch):
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)).eval()
    monkeypatch.setattr("anynorm.apps.models.load.ZOO", {"own": lambda: model})
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    state = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    print_trial("own", seconds=0.05, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert type(model[1]) is nn.BatchNorm1d
    assert not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


def test_random_state_returns_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), keep_randomness():
        random.seed(torch.rand(3).numel() // 0)
    assert torch.equal(torch.get_rng_state(), before)


def across(model, x):
    """Return (evaluation, training) findings about the other samples."""
    return find_batch_dependence(model, Call((x,)))


def padded(model, x):
    """Return (evaluation, training) findings about padding."""
    return find_padding_dependence(model, Call((x,)))


@pytest.mark.parametrize(
    ("norm", "evaluation", "training"),
    [
        (nn.BatchNorm2d(4), False, True),
        (nn.BatchNorm2d(4, track_running_stats=False), True, True),
        (nn.InstanceNorm2d(4), False, False),
        (nn.GroupNorm(2, 4), False, False),
        (nn.LayerNorm([4, 6, 6]), False, False),
    ],
)
def test_dependence_on_other_samples(norm, evaluation, training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Dropout(0.5))
    findings = across(model, torch.randn(4, 3, 8, 8))
    assert [finding.depends for finding in findings] == [evaluation, training]
    for finding in findings:
        assert finding.only_norms == finding.depends
        assert finding.change == 0.0 or finding.change > 1e-3


def test_a_single_sample_is_given_company():
    findings = across(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(1, 3, 8, 8))
    assert [finding.depends for finding in findings] == [False, True]


def test_another_layer_that_joins_samples_is_named_as_such():
    class Centre(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    finding = across(nn.Sequential(Centre(), nn.LayerNorm(5)), torch.randn(4, 5))[1]
    assert finding.depends
    assert not finding.only_norms
    assert "another layer joins the samples" in " ".join(describe_finding(finding, "samples"))


@pytest.mark.parametrize(
    ("norm", "evaluation", "training"),
    [
        (nn.BatchNorm1d(4), False, True),
        (nn.InstanceNorm1d(4, affine=True), True, True),
        (nn.GroupNorm(2, 4), True, True),
        (nn.InstanceNorm1d(4, track_running_stats=True), False, True),
    ],
)
def test_padding_reaches_real_positions_through_norms(norm, evaluation, training):
    # A convolution of width 1 reads no neighbour, so that only the norm can carry the change.
    findings = padded(nn.Sequential(nn.Conv1d(3, 4, 1), norm, nn.Conv1d(4, 2, 1)), torch.randn(4, 3, 12))
    assert [finding.depends for finding in findings] == [evaluation, training]
    assert [finding.only_norms for finding in findings] == [evaluation, training]


def test_padding_reaches_real_positions_through_other_layers_too():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4))
    evaluation, training = padded(model, torch.randn(4, 3, 12))
    assert evaluation.depends
    assert evaluation.kinds == ()
    assert training.depends
    assert not training.only_norms
    assert "another layer does it too" in " ".join(describe_finding(training, "padding"))


def test_layer_norm_over_features_is_free_of_padding():
    for finding in padded(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), torch.randn(4, 9, 5)):
        assert not finding.depends


def test_images_have_no_padding_to_test():
    assert padded(nn.BatchNorm2d(3), torch.randn(4, 3, 8, 8)) == []


def test_a_fixed_length_is_reported():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm([9, 6]))
    assert [finding.change for finding in padded(model, torch.randn(4, 9, 5))] == [None, None]


def test_chance_is_not_taken_for_dependence():
    class FunctionalDropout(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    evaluation, training = padded(nn.Sequential(nn.LayerNorm(5), FunctionalDropout()), torch.randn(4, 9, 5))
    assert not evaluation.depends
    assert training.change is None
    assert "another output each time" in training.note


def test_ratio_interval_and_verdict():
    slow, fast = [2.0, 2.1, 1.9, 2.0, 2.2, 2.0, 2.1, 1.8], [1.0] * 8
    for timing, verdict in (
        (PairedTimings(slow, fast), "faster"),
        (PairedTimings(fast, slow), "slower"),
        (PairedTimings(slow, slow[::-1]), "no difference"),
    ):
        assert dict(describe_speed(timing))["verdict"].startswith(verdict)
        low, high = timing.interval
        assert low <= timing.middle_half[0] <= timing.ratio <= timing.middle_half[1] <= high
    assert PairedTimings(slow, fast).ratio == 2.0


def test_interval_of_the_median_is_that_of_the_binomial_table():
    # For 20 values the 6th and the 15th bound the median with 95.9 % (the 7th and the 14th with 88.5 %).
    values = [float(value) for value in range(1, 21)]
    assert PairedTimings(values, [1.0] * 20).interval == (6.0, 15.0)


class Clock:
    """Stands in for the module `time`: only what a `Slow` model spends passes on it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Slow(nn.Module):
    """A model whose steps take a known time, by a clock of the test's own: a busy machine cannot change it."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.now += self.seconds
        return self.linear(x)


@pytest.fixture
def time_slow(monkeypatch):
    """Time two models that take these seconds per step, for a given time."""

    def measure(before, after, seconds):
        clock = Clock()
        monkeypatch.setattr("anynorm.apps.timing.steps.time", clock)
        call = Call((torch.randn(2, 3),))
        return time_steps(Slow(clock, before), Slow(clock, after), call, seconds), clock.now

    return measure


def test_a_slower_model_is_seen_to_be_slower(time_slow):
    timing, _ = time_slow(0.002, 0.02, seconds=0.2)
    assert timing.ratio == pytest.approx(0.1)
    assert dict(describe_speed(timing))["verdict"] == "slower, on this model and machine"


def test_timing_takes_as_long_as_asked_and_thrice_that_for_the_fewest_pairs(time_slow):
    pair = 0.1 + 0.1
    for seconds, pairs in ((2.0, 10), (0.5, FEWEST_PAIRS), (0.1, 2), (0.01, 2)):
        timing, spent = time_slow(0.1, 0.1, seconds)
        assert pairs <= len(timing.before) == len(timing.after) <= pairs + 1
        assert spent <= (len(timing.before) + 2) * pair + 1e-9, "two steps of each to warm up"


def test_differences():
    one = [torch.tensor([1.0, -4.0, float("nan")])]
    assert largest_difference(one, one).largest == 0.0
    other = [torch.tensor([1.0, -4.5, float("nan")])]
    assert largest_difference(one, other).largest == 0.5
    assert largest_difference(one, other).scale == 4.0
    assert largest_difference(one, [torch.tensor([1.0, float("nan"), 0.0])]).largest == float("inf")
    assert largest_difference([torch.zeros(2)], [torch.zeros(3)]).largest == float("inf")


def test_accuracy_is_measured_against_float64():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    accuracy = compare_outputs(model, model, Call((torch.randn(8, 3),)), training=True)
    assert accuracy.difference.largest == 0.0
    assert accuracy.errors is not None
    assert 0.0 < accuracy.errors[0].largest < 1e-5
    assert accuracy.errors[0] == accuracy.errors[1]


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_the_whole_trial_fits_80_columns_without_colour_codes(name):
    ended = CliRunner().invoke(cli.app, ["try", name, "--seconds", "0.1"])
    assert ended.exit_code == 0, ended.exception
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    for part in ("Norms", "before", "after", "times the speed", "evaluation", "training", "padding"):
        assert part in ended.stdout
    assert ended.stdout.rstrip().endswith("import anynorm; anynorm.accelerate(model)")


def test_outputs_in_dicts_and_tuples_work_and_what_was_left_is_said(models, tmp_path):
    (tmp_path / "subclass.py").write_text(
        textwrap.dedent("""
        from torch import nn
        class OwnNorm(nn.BatchNorm1d): pass
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.mine, self.norm = OwnNorm(4), nn.BatchNorm1d(4)
            def forward(self, x): return {"y": self.norm(self.mine(x)), "nothing": None}
        """)
    )
    ended = CliRunner().invoke(cli.app, ["try", "subclass.py:Model", "--seconds", "0.1", "--batch", "5"])
    assert ended.exit_code == 0, ended.exception
    assert "input 5x4 float32 (made up by anynorm)" in ended.stdout
    assert "1 BatchNorm1d: replaced" in ended.stdout
    assert "1 OwnNorm: left" in ended.stdout
    assert "left mine" in ended.stdout


def test_lazy_layers_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(
        "anynorm.apps.models.load.ZOO", {"own": lambda: nn.Sequential(nn.LazyLinear(4), nn.LayerNorm(4))}
    )
    with pytest.raises(UserError, match="call the model once before returning it"):
        load_model("own")


def test_a_model_made_for_one_batch_size_can_be_tried():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(x.view(8, 5))

    assert [finding.depends for finding in across(Fixed(), torch.randn(8, 5))] == [False, True]


def test_a_model_that_refuses_float64_is_tested_in_float32():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)
            self.register_buffer("scale", torch.ones(5))

        def forward(self, x):
            return self.norm(x) @ torch.eye(5)

    assert [finding.depends for finding in across(Narrow(), torch.randn(8, 5))] == [False, True]
    assert compare_outputs(Narrow(), Narrow(), Call((torch.randn(8, 5),)), training=True).errors is None


def test_a_model_that_fails_in_evaluation_or_backward_ends_in_one_sentence(monkeypatch):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            if not self.training:
                raise RuntimeError("no evaluation")
            return self.norm(x)

    class Spoils(Fails):
        def forward(self, x):
            y = self.norm(x).sigmoid()
            y.register_hook(lambda grad: grad / "two") if y.requires_grad else None
            return y

    for model, sentence in ((Fails, "in evaluation mode the model raised"), (Spoils, "a training step raised")):
        monkeypatch.setattr("anynorm.apps.models.load.ZOO", {"own": lambda model=model: (model(), torch.randn(4, 5))})
        with pytest.raises(UserError, match=sentence):
            print_trial("own", seconds=0.05)
