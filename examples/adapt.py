"""What statistics at test time bring, and where they hurt: MNIST images, clean and brighter.

    python examples/adapt.py

A network of 3 x 100 is trained on clean images, once, and classifies the test images in each way, in batches of several
sizes, shuffled and sorted by class. Some seconds on a CPU; nothing is downloaded.
"""

import contextlib
import warnings

import torch
import torch.nn as nn
from torch.nn.functional import cross_entropy

import anynorm
from anynorm.apps.studies.data import load_data

BRIGHTER = 1.4  # of the training images' standard deviation

warnings.filterwarnings("ignore", message="adapt")  # of small batches, and of one class: they are what is shown
torch.manual_seed(0)
data = load_data("mnist")
(x, y), (unlabelled, _), (test, labels) = map(data.tensors, ("train", "validation", "test"))
layers = [layer for n in (784, 100, 100) for layer in (nn.Linear(n, 100, bias=False), nn.BatchNorm1d(100), nn.ReLU())]
model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(100, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for batch in torch.randint(len(x), (220, 64)):
    optimizer.zero_grad()
    cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
model.eval()

by_class, shuffled = labels.argsort(stable=True), torch.arange(len(labels))
print(f"{'accuracy, %':26}" + "".join(f"{way:>11}" for way in ("averages", "batch", "prior=16", "adabn", "tent")))
for name, shift, order, size in (
    *((f"clean, batches of {n}", 0.0, shuffled, n) for n in (100, 20, 4)),
    *((f"brighter, batches of {n}", BRIGHTER, shuffled, n) for n in (100, 20, 4)),
    *((f"by class, batches of {n}", 0.0, by_class, n) for n in (100, 20, 4)),
):
    tent = anynorm.adapt(model, "tent")
    found = []
    for context, predict in (
        (contextlib.nullcontext(), model),
        (anynorm.adapt(model), model),
        (anynorm.adapt(model, prior=16), model),
        (anynorm.adapt(model, "adabn", loader=(unlabelled + shift).split(100)), model),
        (tent, tent),
    ):
        with context, torch.no_grad():
            predicted = torch.cat([predict(test[part] + shift).argmax(1) for part in order.split(size)])
        found.append(100 * float((predicted == labels[order]).double().mean()))
    print(f"{name:26}" + "".join(f"{accuracy:11.1f}" for accuracy in found))
