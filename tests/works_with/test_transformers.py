"""The callback of transformers' Trainer, with the real package: statistics are those of the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

import anynorm

transformers = pytest.importorskip("transformers", reason="make works-with has it, and runs this")
pytest.importorskip("accelerate", reason="transformers' Trainer wants it; make works-with has it, and runs this")

from anynorm.apps.monitor.read import read_history  # noqa: E402
from anynorm.integrations.transformers import Monitor, Recalibrate  # noqa: E402

X = 3 * torch.randn(44, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 2
DATA = [{"pixel_values": x, "labels": i % 4} for i, x in enumerate(X)]


def make() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4
    )
    model = transformers.ResNetForImageClassification(config)
    anynorm.accelerate(model)
    return model


def fit(path, *callbacks, **options):
    model = make()
    arguments = transformers.TrainingArguments(
        str(path),
        per_device_train_batch_size=11,
        num_train_epochs=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **({"save_strategy": "no"} | options),
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=list(callbacks))
    trainer.train()
    return model, trainer


def check(state: dict[str, torch.Tensor]) -> None:
    """By precise statistics of the first norm, which do not depend on the order of the data."""
    model = make()
    model.load_state_dict(state)
    conv, norm = model.resnet.embedder.embedder.convolution, model.resnet.embedder.embedder.normalization
    with torch.no_grad():
        x = conv(X).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), x.var(1), rtol=1e-5, atol=1e-6)


def test_the_end_of_training(tmp_path):
    model, trainer = fit(tmp_path, Recalibrate())
    check(model.state_dict())
    trainer.save_model(str(tmp_path / "saved"))
    check(transformers.ResNetForImageClassification.from_pretrained(tmp_path / "saved").state_dict())
    without, _ = fit(tmp_path)
    for name, t in without.named_parameters():
        assert torch.equal(t, model.get_parameter(name))


def test_checkpoints_and_evaluations_have_the_statistics_of_their_weights(tmp_path):
    found = []

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, model, **_):
            found.append({name: t.clone() for name, t in model.state_dict().items()})

    fit(tmp_path, Recalibrate(validation=True), Watch(), eval_strategy="epoch", save_strategy="epoch")
    assert len(found) == 2
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert len(folders) == 2
    for state in [
        *found,
        *(transformers.ResNetForImageClassification.from_pretrained(f).state_dict() for f in folders),
    ]:
        check(state)


def test_steps_want_a_loader_of_their_own(tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
    with pytest.raises(ValueError, match="must not be read anew within an epoch"):
        fit(tmp_path, Recalibrate(validation=True), **steps)
    loader = DataLoader([{"pixel_values": x} for x in X], batch_size=11)
    model, _ = fit(tmp_path, Recalibrate(validation=True, loader=loader), **steps)
    check(model.state_dict())


def test_a_model_without_batch_norm_is_said_at_the_start(tmp_path):
    control = transformers.TrainerControl()
    with pytest.raises(ValueError, match="got none in Linear"):
        Recalibrate().on_train_begin(None, None, control, model=nn.Linear(2, 2))


def test_the_monitor_watches_a_training_and_changes_nothing(tmp_path):
    watch = Monitor(tmp_path / "run.csv", every=3)
    watched, _ = fit(tmp_path, watch, eval_strategy="epoch")
    plain, _ = fit(tmp_path, eval_strategy="epoch")
    for name, t in plain.state_dict().items():
        assert torch.equal(t, watched.state_dict()[name])
    history = read_history(tmp_path / "run.csv")
    assert history.steps == [0, 3, 6]  # 4 batches, twice; evaluation counts nothing
    assert watch.monitor.step == 8
    records = history.records["resnet.embedder.embedder.normalization"]
    assert all(record.calls == 1 and record.gradient > 0 for record in records)
    assert not watched._forward_pre_hooks
