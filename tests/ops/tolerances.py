"""The one tolerance table of the operator's tests: how far a result may be from the float64 oracle.

Errors are normwise, max |a - b| / max |b|, so that an element near zero, which cancellation leaves
with few correct digits in any order of summation, is measured against its map.
"""

from dataclasses import dataclass

import torch
from ops_cases import DEVICE, TRITON
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Bounds for feature maps (rounded to their storage type) and for everything per channel."""

    maps: float
    channels: float


TOLERANCES = {
    # Some ten rounding errors of 1.1e-16 at the ends of sums over up to 3,000 elements, whose
    # errors grow with the square root of that: 50 * 1.1e-16 * 10.
    torch.float64: Tolerance(maps=5e-14, channels=5e-14),
    # The same counts with a rounding error of 6e-8 would be 3e-5; sums are merged in double
    # precision per block of at most 1,024 elements, which leaves a tenth of it.
    torch.float32: Tolerance(maps=3e-6, channels=1e-5),
    # Storage keeps 8 bits: half a unit in the last place is at most 2^-8 of a value, once for a map
    # that is written once. Sums and the gate are float32: per-channel results are as with float32.
    torch.bfloat16: Tolerance(maps=2**-8 + 1e-5, channels=1e-5),
    # 11 bits; otherwise as bfloat16.
    torch.float16: Tolerance(maps=2**-11 + 1e-5, channels=1e-5),
}

if TRITON and DEVICE == "cpu":
    # Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: a whole unit.
    TOLERANCES[torch.bfloat16] = Tolerance(maps=2**-7 + 1e-5, channels=1e-5)

MAPS = frozenset({"y", "x", "shortcut"})


def error(found: Tensor, expected: Tensor) -> float:
    """Normwise relative error; an expected map of zeros is compared absolutely."""
    if expected.numel() == 0:
        return 0.0
    expected = expected.detach().double()
    difference = (found.detach().double() - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-30))


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, what: object = ""
) -> None:
    """Every entry of `expected`, and no other, is in `found` and within the table's bounds."""
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        bound = TOLERANCES[dtype].maps if name in MAPS else TOLERANCES[dtype].channels
        size = error(found[name], value)
        assert size <= bound, f"{name}: error {size:.2e} > {bound:.2e} ({what})"
