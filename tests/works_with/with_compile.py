"""torch export and AOTInductor: an accelerated model is exported, packaged, loaded, and gives the same numbers."""

import tempfile

import torch
from torch import nn

import anynorm

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LayerNorm(128))
anynorm.accelerate(model)
model.eval()
x = torch.randn(4, 3, 6, 6)
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    program = torch.export.export(model, (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert "aten.batch_norm.default" in names and "aten.layer_norm.default" in names, names
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
    loaded = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
print("with a catch: an exported program holds torch's operations, not our kernels")
