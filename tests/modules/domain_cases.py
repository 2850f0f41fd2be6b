"""Domain batch norms, and how the tests of them compare and train."""

import torch

import anynorm
from surgery.recalibration_cases import draw

DOMAINS = ("day", "night")
SHAPES = {1: (6, 3, 5), 2: (4, 3, 5, 2), 3: (2, 3, 4, 2, 3)}


def make(n: int = 2, **options):
    return getattr(anynorm, f"DomainBatchNorm{n}d")(3, **{"domains": DOMAINS, **options})


def copy_of(norm, domain: str):
    """An ordinary batch norm with the state of one domain."""
    n = type(norm).__name__[-2]
    twin = getattr(anynorm, f"BatchNorm{n}d")(3, momentum=norm.momentum).train(norm.training)
    with anynorm.domain(domain), torch.no_grad():
        for name, t in twin.state_dict().items():
            t.copy_(getattr(norm, name))
    return twin


def train(norm, steps: int = 3) -> None:
    """Let the domains see unlike data, and gamma and beta move."""
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    for step in range(steps):
        for index, name in enumerate(DOMAINS[: 1 + (step < 2)]):
            with anynorm.domain(name):
                optimizer.zero_grad()
                norm(draw(*SHAPES[2], seed=step, mean=5 * index)).square().sum().backward()
                optimizer.step()
