"""Fine in training, useless in evaluation: the doctor finds the layer and the cause, and mends it. MNIST images.

    python examples/train_eval_gap.py

A network of 3 x 100 is trained on batches of one class each, as where files lie in a folder for each class and nobody
shuffled. Some seconds on a CPU; nothing is downloaded.
"""

import copy

import torch
import torch.nn as nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import anynorm
from anynorm.apps.studies.data import load_data

torch.set_num_threads(1)  # the order of sums, and so the figures, do not depend on the number of cores
torch.manual_seed(0)
data = load_data("mnist")
(x, y), (test, labels) = map(data.tensors, ("train", "test"))
layers = [layer for n in (784, 100, 100) for layer in (nn.Linear(n, 100, bias=False), nn.BatchNorm1d(100), nn.ReLU())]
model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(100, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

by_class = [torch.nonzero(y == label).flatten().split(50) for label in range(10)]  # a folder for each class
batches = [part for parts in zip(*by_class) for part in parts]  # from folder to folder
loader = DataLoader(TensorDataset(x, y), batch_sampler=batches)
for _ in range(11):
    for images, classes in loader:
        optimizer.zero_grad()
        loss = cross_entropy(model(images), classes)
        loss.backward()
        optimizer.step()


def measure(images: torch.Tensor, classes: torch.Tensor, training: bool = False) -> float:
    """Accuracy in %; of a copy, whose running averages may move."""
    with torch.no_grad():
        outputs = copy.deepcopy(model).train(training)(images)
    return 100 * float((outputs.argmax(1) == classes).double().mean())


seen = sum(measure(*batch, training=True) for batch in loader) / len(loader)
print(f"training batches in training mode: {seen:.1f} %")
before = measure(test, labels)
print(f"test images in evaluation: {before:.1f} %\n")

diagnosis = anynorm.diagnose(model, loader, optimizer, batches=len(loader))
print(diagnosis, "\n")
for finding in diagnosis.apply().done:
    print(f"mended {finding.check} at layer {finding.layer}: {', '.join(map(str, finding.effects))}")
print(f"test images in evaluation: {before:.1f} % before, {measure(test, labels):.1f} % after")
