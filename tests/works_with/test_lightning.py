"""The Lightning callback, with the real package: statistics equal those of `recalibrate` on the same weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

import anynorm

pl = pytest.importorskip("lightning.pytorch", reason="make works-with has it, and runs this")

from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging  # noqa: E402

from anynorm.apps.monitor.read import read_history  # noqa: E402
from anynorm.integrations.lightning import Monitor, Recalibrate  # noqa: E402

X = 3 * torch.randn(44, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 2
DATA = TensorDataset(X, torch.arange(44) % 4)

# lightning 2.6 asks torch's pytree in a way that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, 4))
        self.layers = nn.Sequential(*layers)
        anynorm.accelerate(self)
        self.seen: list[dict[str, torch.Tensor]] = []

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.seen.append(copy.deepcopy(self.state_dict()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(DATA, batch_size=8)

    def val_dataloader(self):
        return DataLoader(DATA, batch_size=44)


def fit(*callbacks, epochs=3, **options):
    model = Model()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=False, **(quiet | options))
    trainer.fit(model)
    return model, trainer


def check(state: dict[str, torch.Tensor], batches=None) -> None:
    """The statistics of a state are those of its weights."""
    model = Model()
    model.load_state_dict(state)
    anynorm.recalibrate(model.eval(), DataLoader(DATA, batch_size=8), batches=batches)
    for name, t in model.state_dict().items():
        torch.testing.assert_close(state[name], t, rtol=1e-5, atol=1e-6)


def test_plain_weights_and_modes():
    model, _ = fit(Recalibrate())
    check(model.state_dict())
    assert model.layers[3].training  # as training leaves it
    without, _ = fit()
    for name, t in without.named_parameters():
        assert torch.equal(t, model.get_parameter(name))


def test_limits_and_options_are_kept():
    model, _ = fit(Recalibrate(), limit_train_batches=2)
    check(model.state_dict(), 2)
    model, _ = fit(Recalibrate(batches=3, loader=DataLoader(DATA, batch_size=8)))
    check(model.state_dict(), 3)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_weights_are_validated_and_saved_with_their_own(use_buffers, tmp_path):
    average = EMAWeightAveraging(decay=0.9, use_buffers=use_buffers)
    model, trainer = fit(average, Recalibrate(validation=True))
    assert len(model.seen) == 4  # the first of the sanity check
    for state in model.seen[-3:]:
        check(state)
    check(model.state_dict())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    check(saved)
    plain, _ = fit()
    assert not torch.equal(plain.layers[0].weight, model.layers[0].weight)


def test_training_goes_on_with_its_own_weights_after_a_validation():
    without, _ = fit(EMAWeightAveraging(decay=0.9))
    model, _ = fit(EMAWeightAveraging(decay=0.9), Recalibrate(validation=True))
    for name, t in without.named_parameters():
        torch.testing.assert_close(t, model.get_parameter(name), rtol=0, atol=0)


def test_stochastic_weight_averaging():
    model, _ = fit(StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1), Recalibrate(), epochs=4)
    check(model.state_dict())
    assert model.layers[1].momentum == 0.1


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_batches_and_calls_are_those_of_the_precision(precision):
    model, _ = fit(Recalibrate(), precision=precision, epochs=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        x = model.layers[0](X.to(model.layers[0].weight.dtype)).double().transpose(0, 1).flatten(1)
    norm = model.layers[1]
    torch.testing.assert_close(norm.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), x.var(1), rtol=1e-5, atol=1e-6)


def test_what_would_fail_at_the_end_is_said_at_the_start():
    with pytest.raises(ValueError, match="it must come behind EMAWeightAveraging"):
        fit(Recalibrate(), EMAWeightAveraging())
    with pytest.raises(ValueError, match="must have a batch norm with running averages; got none in Linear"):
        Recalibrate().on_fit_start(None, nn.Linear(2, 2))


def test_the_monitor_watches_a_training_and_changes_nothing(tmp_path):
    watch = Monitor(tmp_path / "run.sqlite", every=4)
    watched, _ = fit(watch)
    plain, _ = fit()
    for name, t in plain.state_dict().items():
        assert torch.equal(t, watched.state_dict()[name])
    history = read_history(tmp_path / "run.sqlite")
    assert (history.steps, [*history.records]) == ([0, 4, 8, 12, 16], ["layers.1"])  # 6 batches, 3 times
    assert all(record.calls == 1 and record.gradient > 0 for record in history.records["layers.1"])
    assert watch.monitor.step == 18
    assert not watched.layers[1]._forward_pre_hooks


def test_the_monitor_needs_no_call_of_the_whole_module_and_survives_failures():
    class Apart(Model):
        def training_step(self, batch, number):
            if number == 3:
                raise RuntimeError("a broken batch")
            return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    watch, model = Monitor(every=1), Apart()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, callbacks=[watch], enable_checkpointing=False, **quiet)
    with pytest.raises(RuntimeError, match="a broken batch"):
        trainer.fit(model)
    assert not watch.monitor.is_open
    assert not model.layers[1]._forward_pre_hooks
    assert watch.monitor.step == 4


def test_the_monitor_writes_to_the_trainers_logger(tmp_path):
    seen = {}

    class Experiment(pl.loggers.CSVLogger):
        experiment = SimpleNamespace(add_scalar=lambda tag, value, step: seen.update({(tag, step): value}))

        def log_metrics(self, metrics, step=None):
            pass

        def save(self):
            pass

    fit(Monitor(every=6, writer=True), logger=Experiment(tmp_path), log_every_n_steps=1)
    assert {step for tag, step in seen if tag == "norm_gap/layers.1"} == {0, 6, 12}


@pytest.mark.parametrize("logger", [False, True])
def test_the_monitor_says_which_logger_it_needs(logger, tmp_path):
    chosen = pl.loggers.CSVLogger(tmp_path) if logger else False
    name = "CSVLogger" if logger else "NoneType"
    with pytest.raises(ValueError, match=f"writer=True needs a TensorBoardLogger; got {name}"):
        fit(Monitor(writer=True), logger=chosen, log_every_n_steps=1)
