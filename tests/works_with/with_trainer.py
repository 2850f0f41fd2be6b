"""transformers Trainer: the callback recalibrates a ResNet when training ends."""

import tempfile

import torch
import vision  # noqa: F401
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import anynorm
from anynorm.integrations.transformers import Recalibrate

torch.manual_seed(0)
config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4)
model = ResNetForImageClassification(config)
anynorm.accelerate(model)
x = 3 * torch.randn(32, 3, 32, 32) + 2
data = [{"pixel_values": each, "labels": i % 4} for i, each in enumerate(x)]
with tempfile.TemporaryDirectory() as folder:
    options = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(folder, num_train_epochs=1, per_device_train_batch_size=8, **options)
    Trainer(model, arguments, train_dataset=data, callbacks=[Recalibrate()]).train()
embedder = model.resnet.embedder.embedder
seen = embedder.convolution(x).detach().transpose(0, 1).flatten(1)
torch.testing.assert_close(embedder.normalization.running_mean, seen.mean(1), rtol=1e-4, atol=1e-5)
print("with a catch: `Recalibrate(validation=True)` by steps wants a loader of its own")
