"""lightning: averaged weights (EMA) are recalibrated by the callback when training ends."""

import torch
import vision  # noqa: F401
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import anynorm
from anynorm.integrations.lightning import Recalibrate


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


torch.manual_seed(0)
model = Model()
anynorm.accelerate(model)
x = torch.randn(40, 5) + 1
loader = DataLoader(TensorDataset(x, torch.arange(40) % 3), batch_size=8, shuffle=True)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
callbacks = [EMAWeightAveraging(decay=0.9), Recalibrate()]
Trainer(max_epochs=2, callbacks=callbacks, accelerator="cpu", **quiet).fit(model, loader)
seen = model.net[0](x).detach()
torch.testing.assert_close(model.net[1].running_mean, seen.mean(0), rtol=1e-4, atol=1e-5)
torch.testing.assert_close(model.net[1].running_var, seen.var(0), rtol=1e-4, atol=1e-5)
print("with a catch: `Recalibrate` comes behind the averaging callback, or it is refused when fitting starts")
