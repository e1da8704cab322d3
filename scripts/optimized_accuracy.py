"""How far senet.optimize is from eager and from float64, for every network of the registry.

    python scripts/optimized_accuracy.py [--state fresh|calibrated] [NAME …]

`fresh`: as `create_model` gives it; `calibrated`: its batch norms have seen a batch, as training
would have them. All differences are relative to the largest logit.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

from senet import create_model, list_models, optimize
from senet.inference.rounding import difference


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Give the batch norms the statistics of a batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(images)


@torch.no_grad()
def row(name: str, state: str) -> tuple[float, float, float]:
    """Eager from float64, optimized from float64, optimized from eager."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10)
    side = 32 if model.input_size[1] <= 32 else max(96, model.min_input_size)
    if state == "calibrated":
        calibrate(model, torch.randn(8, model.input_size[0], side, side))
    model.eval()
    x = torch.randn(2, model.input_size[0], side, side)
    optimized = optimize(model, x)
    eager, found = model(x), optimized(x)
    exact = copy.deepcopy(model).double()(x.double())
    return (
        difference(eager.double(), exact),
        difference(found.double(), exact),
        difference(found, eager),
    )


def main() -> None:
    """Print a line for each network, the worst last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", choices=("fresh", "calibrated"), default="calibrated")
    parser.add_argument("names", nargs="*", default=list_models(), metavar="NAME")
    options = parser.parse_args()
    rows = []
    for name in options.names:
        rows.append((*row(name, options.state), name))
        print(name, *(f"{value:.1e}" for value in rows[-1][:3]), flush=True)
    within = sum(found <= 1e-5 for _, _, found, _ in rows)
    worst = max(found for _, _, found, _ in rows)
    print(f"{options.state}: {within} of {len(rows)} within 1e-5 of eager; worst {worst:.1e}")


if __name__ == "__main__":
    main()
