"""onnxruntime: an accelerated and fused ResNet block is exported by `torch.onnx` and gives the same numbers."""

import tempfile

import numpy as np
import onnxruntime
import torch
import vision  # noqa: F401
from torch import nn

import anynorm

torch.manual_seed(0)
layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8), nn.Flatten(), nn.LayerNorm(128))
model = nn.Sequential(*layers, nn.Linear(128, 16), nn.RMSNorm(16, eps=1e-6))
model(torch.randn(8, 3, 6, 6))
anynorm.accelerate(model, fuse=True)
model.eval()
x = torch.randn(4, 3, 6, 6)
with tempfile.TemporaryDirectory() as folder:
    torch.onnx.export(model, (x,), f"{folder}/model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
print("works: in evaluation mode, by the exporter `dynamo=True`")
