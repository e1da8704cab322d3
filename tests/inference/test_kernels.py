"""The C++ kernels of senet.optimize against PyTorch in float64, one layer at a time."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from senet import kernels
from senet.inference import chains
from senet.inference.program import Program, Stretch
from senet.inference.rewrite import Rewriter
from senet.kernels.structs import Kind, Step
from senet.nn.block import SqueezeExcitation

pytestmark = pytest.mark.skipif(bool(kernels.MISSING), reason=kernels.MISSING)

# Rounding of sums of up to some thousand float32 products, relative to the largest output; the
# transforms of F(4×4, 3×3) double it.
TOLERANCE = 3e-6

# channels in, channels out, kernel, stride, padding, dilation, groups, height, width
CONVOLUTIONS = {
    "1x1": (64, 96, 1, 1, 0, 1, 1, 14, 14),
    "1x1 of odd channels": (37, 41, 1, 1, 0, 1, 1, 9, 5),
    "1x1, many channels": (1024, 48, 1, 1, 0, 1, 1, 7, 7),
    "1x1 with stride": (48, 64, 1, 2, 0, 1, 1, 15, 14),
    "1x1 with padding": (16, 16, 1, 1, 1, 1, 1, 6, 6),
    "stem 7x7": (3, 64, 7, 2, 3, 1, 1, 33, 40),
    "F(4,3)": (32, 64, 3, 1, 1, 1, 1, 28, 28),
    "F(4,3), ragged": (24, 40, 3, 1, 1, 1, 1, 13, 17),
    "F(2,3)": (32, 48, 3, 1, 1, 1, 1, 6, 6),
    "F(2,3), ragged": (17, 33, 3, 1, 1, 1, 1, 5, 6),
    "F(4,3) without padding": (16, 32, 3, 1, 0, 1, 1, 10, 11),
    "F(4,3), few tiles": (256, 256, 3, 1, 1, 1, 1, 14, 14),
    "3x3 with stride": (32, 64, 3, 2, 1, 1, 1, 15, 15),
    "3x3 dilated": (16, 32, 3, 1, 2, 2, 1, 12, 12),
    "1x7": (20, 28, (1, 7), 1, (0, 3), 1, 1, 12, 12),
    "few channels": (4, 5, 3, 1, 1, 1, 1, 8, 8),
    "grouped": (128, 128, 3, 1, 1, 1, 32, 14, 14),
    "grouped by 2": (48, 48, 3, 1, 1, 1, 24, 9, 8),
    "grouped by 4 with stride": (128, 128, 3, 2, 1, 1, 32, 15, 14),
    "grouped by 8": (72, 72, 3, 1, 1, 1, 9, 7, 15),
    "grouped by 8 with stride": (64, 64, 3, 2, 1, 1, 8, 14, 15),
    "grouped without padding": (32, 32, 3, 1, 0, 1, 8, 9, 10),
    "grouped by 16": (64, 64, 3, 1, 1, 1, 4, 14, 14),
    "pairs of groups by 16": (48, 48, 3, 1, 1, 1, 3, 7, 7),
    "pairs of groups by 24": (120, 120, 3, 1, 1, 1, 5, 9, 29),
    "pairs of groups by 24 with stride": (48, 48, 3, 2, 1, 1, 2, 15, 13),
    "pairs of groups by 12": (60, 60, 5, 1, 2, 1, 5, 8, 15),
    "pairs of unequal groups": (80, 160, 3, 2, 0, 1, 4, 14, 15),
    "grouped, wide groups": (64, 128, 3, 2, 1, 1, 2, 14, 14),
    "grouped 1x1": (240, 60, 1, 1, 0, 1, 3, 7, 7),
    "depthwise": (50, 50, 3, 2, 1, 1, 50, 14, 13),
    "map of one pixel": (64, 64, 3, 1, 1, 1, 1, 1, 1),
}


class Tail(nn.Module):
    """Convolution, batch norm and, as wanted, SE, addition and ReLU."""

    def __init__(self, conv: nn.Conv2d, se: bool, shortcut: bool, relu: bool) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)
        self.se = SqueezeExcitation(conv.out_channels, hidden=8) if se else nn.Identity()
        self.other = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        self.shortcut, self.relu = shortcut, relu
        for value in (self.bn.running_mean, self.bn.bias.data):
            nn.init.normal_(value, 0, 0.2)
        for value in (self.bn.running_var, self.bn.weight.data):
            nn.init.uniform_(value, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.bn(self.conv(x)))
        if self.shortcut:
            y = y + self.other(torch.relu(x))  # of another map: else one convolution does both
        return torch.relu(y) if self.relu else y


def native(model: nn.Module, x: Tensor, threads: int = 2) -> Tensor:
    """The model through the kernels; fails where PyTorch would have to help."""
    program = Program(Rewriter(model.eval()).run(), x, threads, {})
    assert len(program.parts) == 1
    first = program.run(x)
    again = program.run(x)  # in the same buffers
    assert torch.equal(first.nan_to_num(1e9), again.nan_to_num(1e9))
    return first


def error(found: Tensor, model: nn.Module, x: Tensor) -> float:
    """Largest difference from the model in float64, relative to its largest output."""
    wanted = model.double()(x.double())
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def convolution(name: str) -> tuple[nn.Conv2d, Tensor]:
    c, d, kernel, stride, padding, dilation, groups, h, w = CONVOLUTIONS[name]
    conv = nn.Conv2d(c, d, kernel, stride, padding, dilation, groups, bias=False)
    return conv, torch.rand(3, c, h, w) - 0.3


@torch.no_grad()
@pytest.mark.parametrize("tail", ["plain", "relu", "shortcut", "gates", "all"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_and_its_tail(name: str, tail: str) -> None:
    conv, x = convolution(name)
    model = Tail(
        conv, tail in ("gates", "all"), tail in ("shortcut", "all"), tail in ("relu", "all")
    )
    assert error(native(model, x), model, x) < TOLERANCE


# channels in, channels out, kernel, stride, groups, side: sums of 1,000 to 4,000 products
LONG = {
    "1x1": (3000, 40, 1, 1, 1, 7),
    "of a vector": (3000, 40, 1, 1, 1, 1),
    "patches": (400, 40, 3, 2, 1, 7),
    "F(2,3)": (1000, 40, 3, 1, 1, 4),
    "sliding": (240, 120, 3, 2, 2, 9),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LONG)
def test_long_sums_of_one_sign_are_summed_in_parts(name: str) -> None:
    """One behind the other, each product is rounded to the size of the whole sum: 4e-7 to 8e-7."""
    c, d, kernel, stride, groups, side = LONG[name]
    conv = nn.Conv2d(c, d, kernel, stride, kernel // 2, 1, groups)
    nn.init.uniform_(conv.weight, 0, 1)
    x = torch.rand(1, c, side, side)
    found, wanted = native(conv, x).double(), conv.double()(x.double())
    assert ((found - wanted) / wanted).square().mean().sqrt() < 2e-7


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_small_excitations_run_image_by_image(kernel: int, threads: int) -> None:
    """One thread takes an image from its squeeze to its gates while another is at the next."""
    model = Tail(nn.Conv2d(24, 40, kernel, padding=kernel // 2), True, True, True)
    x = torch.randn(9, 24, 13, 11)
    program = Program(Rewriter(model.eval()).run(), x, threads, {})
    assert sum(step.kind == Kind.IMAGES for step in program.parts[0].steps) == 1
    first = program.run(x)
    assert all(torch.equal(program.run(x), first) for _ in range(20))
    assert error(first, model, x) < TOLERANCE


class ByModules(nn.Module):
    """A convolution and an SE block of other people's layers, whose gates another one reads.

    Args:
        hidden_is_read: whether the hidden vector is read a second time.
    """

    def __init__(self, hidden_is_read: bool = False) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(8, 72, 3, padding=1), nn.Conv2d(72, 16, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(72, 24, 1), nn.Conv2d(24, 72, 1)
        self.act, self.gate = nn.SiLU(), nn.Hardsigmoid()
        self.again = nn.Conv2d(24, 16, 1) if hidden_is_read else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(x))
        hidden = self.act(self.reduce(self.pool(x)))
        y: Tensor = self.after(x * self.gate(self.expand(hidden)))
        return y if self.again is None else y * self.again(hidden)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("images", [1, 2, 3, 9])
def test_small_excitations_of_other_layers_too(images: int, threads: int) -> None:
    model, x = ByModules(), torch.randn(images, 8, 13, 11)
    program = Program(Rewriter(model.eval()).run(), x, threads, {})
    kinds = [Kind(step.kind) for step in program.parts[0].steps]
    assert kinds.count(Kind.EXCITATION) == 2
    together = images == 1 or images >= 2 * threads
    assert kinds.count(Kind.IMAGES) == together
    if together:
        place = kinds.index(Kind.IMAGES)
        following = kinds[place + 1 : place + 4]
        assert following == [Kind.MEANS, Kind.EXCITATION, Kind.EXCITATION]
        assert program.parts[0].steps[place].steps == 3
    first = program.run(x)
    assert all(torch.equal(program.run(x), first) for _ in range(20))
    assert error(first, model, x) < TOLERANCE


@torch.no_grad()
def test_a_hidden_vector_read_twice_is_kept() -> None:
    model, x = ByModules(hidden_is_read=True), torch.randn(9, 8, 13, 11)
    program = Program(Rewriter(model.eval()).run(), x, 2, {})
    kinds = [Kind(step.kind) for step in program.parts[0].steps]
    assert kinds.count(Kind.EXCITATION) == 1
    assert error(program.run(x), model, x) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 2, 7])
def test_excitation_is_summed_in_float64(images: int) -> None:
    """Means of 1000 whose weighted sum is near 0: sums in float32 fail this by two digits."""
    model = SqueezeExcitation(512, hidden=96)
    signs = torch.tensor([1.0, -1.0]).repeat(256)
    model.fc1.weight.mul_(0.05).add_(signs)
    x = 1000 + torch.randn(images, 512, 1, 1)  # one pixel: means are exact
    found = native(nn.Sequential(model), x)
    hidden = model.double().fc1(x.double().mean((2, 3)))
    assert hidden.abs().max() < 500  # of 512,000 that are added up
    assert error(found, model, x) < 1e-6


@torch.no_grad()
def test_winograd_rounds_little() -> None:
    """Root mean square error of F(4×4, 3×3): 1.2e-6 with the points ±1/√2, ±√2.

    The usual points ±1, ±2 give more than twice that.
    """
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    x = torch.relu(torch.randn(1, 256, 28, 28))
    found = native(nn.Sequential(conv), x)
    wanted = conv.double()(x.double())
    error = ((found - wanted).square().mean() / wanted.square().mean()).sqrt()
    assert error < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name.startswith("pairs")])
def test_pairs_of_groups_and_their_sums(name: str, threads: int) -> None:
    conv, x = convolution(name)
    model = nn.Sequential(conv, nn.Hardswish(), nn.AdaptiveAvgPool2d(1)).eval()
    program = Program(Rewriter(model).run(), x, threads, {})
    steps = program.parts[0].steps
    isa, fills_half = kernels.instruction_set(), "avx2" if name.endswith("by 12") else "avx512"
    if isa != "baseline":
        assert any(step.kind == Kind.PAIRED for step in steps) == (isa == fills_half)
    assert summing_convolutions(steps) == 1
    assert error(program.run(x), model, x) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("width", [5, 16, 37])
def test_input_of_three_channels_in_any_layout(width: int) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1)).eval(), torch.randn(2, 3, 6, 2 * width)
    inputs = [x, x.contiguous(memory_format=torch.channels_last), x[..., ::2], x.mT]
    for each in inputs:
        assert error(native(model.float(), each), model, each) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["F(4,3)", "F(4,3), few tiles", "grouped", "1x1"])
def test_threads_change_no_bit(name: str, threads: int) -> None:
    conv, x = convolution(name)
    model = Tail(conv, True, True, True)
    # The cut into tasks follows the number of threads, sums over a convolution's depth do not;
    # only the squeeze is summed in parts.
    plain = Tail(conv, False, True, True)
    assert torch.equal(native(plain, x, threads), native(plain, x, 2))
    assert torch.allclose(native(model, x, threads), native(model, x, 2), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 2, 0, ceil_mode=True),
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d(1),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [3, 40])
def test_pooling(pool: nn.Module, channels: int) -> None:
    x = torch.randn(2, channels, 12, 11)
    model = nn.Sequential(pool)
    assert error(native(model, x), model, x) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (6, 5)])
def test_products_of_maps_and_vectors(size: tuple[int, int]) -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pooled = torch.nn.functional.adaptive_avg_pool2d(x, 1)
            y = torch.mul(pooled, pooled.mul(pooled) * 0.5) * x
            return y * torch.flatten(pooled, 1).mul(2)[:, :, None, None]

    model, x = Products(), torch.randn(2, 19, *size)
    program = Program(Rewriter(model).run(), x, 2, {})  # without an example nothing is rewritten
    assert error(program.run(x), model, x) < TOLERANCE
    kinds = [
        Kind(step.kind)
        for part in program.parts
        if isinstance(part, Stretch)
        for step in part.steps
    ]
    assert kinds.count(Kind.POINTWISE) > 4


def test_max_pooling_keeps_nan() -> None:
    x = torch.zeros(1, 3, 4, 4)
    x[0, 1, 0, 0] = float("nan")
    found = native(nn.Sequential(nn.MaxPool2d(2)), x)
    assert torch.equal(found.isnan(), nn.MaxPool2d(2)(x).isnan())
    assert found.isnan().sum() == 1


@torch.no_grad()
@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "relu", "hard_sigmoid", "identity_sigmoid"])
def test_se_alone(gate: str) -> None:
    model = nn.Sequential(SqueezeExcitation(37, 4, gate=gate))
    nn.init.normal_(model[0].fc2.weight)
    x = torch.randn(3, 37, 9, 8)
    assert error(native(model, x), model, x) < TOLERANCE


class Branches(nn.Module):
    """Parallel convolutions into one concat, one of them read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 20, 1), nn.Conv2d(8, 13, 3, padding=1)
        self.c = nn.Conv2d(46, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        pooled = torch.nn.functional.max_pool2d(a, 3, 1, 1).roll(1, 1)
        joined = torch.cat([a, self.b(x), pooled[:, :13]], 1)
        return self.c(joined) * 0.5


@torch.no_grad()
def test_concat_of_parts_from_kernels_and_from_pytorch() -> None:
    model = Branches().eval()
    x = torch.randn(2, 8, 10, 10)
    program = Program(Rewriter(model).run(), x, 2, {})
    assert len(program.parts) == 3  # kernels, the roll in PyTorch, kernels
    assert error(program.run(x), model, x) < TOLERANCE


def summing_convolutions(steps: Iterable[Step]) -> int:
    return sum(step.sums_ld > 0 for step in steps if step.kind not in (Kind.SUMS, Kind.MEANS))


class SqueezedBranches(nn.Module):
    """As an Inception module: convolutions of several kinds and pooling, joined, SE, a reader."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(20, 21, 1), nn.Conv2d(20, 48, 3, padding=1)
        self.c = nn.Conv2d(20, wide, (1, 3), padding=(0, 1))
        self.se = SqueezeExcitation(21 + 48 + wide + 20, 4)
        self.d = nn.Conv2d(self.se.channels, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.nn.functional.max_pool2d(x, 3, 1, 1)
        parts = [torch.relu(self.a(x)), torch.relu(self.b(x)), torch.relu(self.c(pooled)), pooled]
        return self.d(self.se(torch.cat(parts, 1)))


@torch.no_grad()
@pytest.mark.parametrize(("size", "wide"), [((40, 37), 16), ((6, 5), 300), ((1, 1), 16)])
@pytest.mark.parametrize("images", [1, 3, 7])
def test_se_alone_behind_branches(size: tuple[int, int], wide: int, images: int) -> None:
    """Convolutions write where the concat lies and add up what they write; nothing is copied."""
    model = SqueezedBranches(wide).eval()
    nn.init.normal_(model.se.fc2.weight)
    x, graph = torch.randn(images, 20, *size), Rewriter(model).run()
    for threads in (1, 2):
        program = Program(graph, x, threads, {})
        (part,) = program.parts
        kinds = [Kind(step.kind) for step in part.steps]
        groups = kinds.count(Kind.INPUT)  # of images
        assert summing_convolutions(part.steps) == 3 * groups
        assert kinds.count(Kind.SUMS) == groups  # the pooled branch
        assert kinds.count(Kind.POINTWISE) == 0
        assert sum(step.input_gates_ld > 0 for step in part.steps) == groups  # the scaling
        assert error(program.run(x), model, x) < TOLERANCE


@torch.no_grad()
def test_branches_in_groups_of_images() -> None:
    class Grouped(SqueezedBranches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean((2, 3))

    model = Grouped(16).eval()
    x = torch.randn(4, 20, 160, 160)
    program = Program(Rewriter(model).run(), x, 2, {})
    steps = program.parts[0].steps
    assert sum(step.kind == Kind.INPUT for step in steps) > 1
    assert summing_convolutions(steps) > 3
    assert error(program.run(x), model, x) < TOLERANCE


@torch.no_grad()
def test_scaling_spares_a_map_that_is_read_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.se = nn.Conv2d(8, 20, 1), SqueezeExcitation(20, 4)
            self.after = nn.Conv2d(20, 20, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv(x))
            return self.after(self.se(y)) + self.after(y)

    model = Twice().eval()
    x = torch.randn(2, 8, 9, 9)
    assert error(native(model, x), model, x) < TOLERANCE


@torch.no_grad()
def test_groups_of_images_give_the_same_as_the_whole_batch() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 128, 3, padding=1),
        nn.ReLU(),
        Tail(nn.Conv2d(128, 128, 1), True, True, True),
        nn.Conv2d(128, 8, 1),
    )
    x = torch.randn(6, 3, 96, 96)
    program = Program(Rewriter(model.eval()).run(), x, 2, {})
    steps = program.parts[0].steps
    assert sum(step.kind == Kind.INPUT for step in steps) == 6  # one image at a time
    assert error(program.run(x), model, x) < TOLERANCE


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa: str) -> None:
    if isa == "avx2" and kernels.instruction_set() == "baseline":
        pytest.skip("this processor has no AVX2")
    selected = (
        "all and not other or few_tiles or pooling or se_alone or test_chains or test_depthwise"
        " or pairs or three_channels or one_image"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", selected, "-p", "no:cacheprovider"],
        env=os.environ | {"SENET_ISA": isa, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


class IntoConcat(nn.Module):
    """A tail between other parts of a concat: its rows there are wider than its shortcut's."""

    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self.tail = tail
        self.side = copy.deepcopy(tail.other)
        self.last = nn.Conv2d(4 * tail.conv.out_channels, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x)
        return self.last(torch.cat([side, self.tail(x), torch.relu(side), 2 * side], 1))


@torch.no_grad()
@pytest.mark.parametrize("se", [False, True], ids=["plain", "gates"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_shortcut_keeps_its_rows_where_the_output_lies_in_a_concat(name: str, se: bool) -> None:
    conv, x = convolution(name)
    model = IntoConcat(Tail(conv, se, True, True)).eval()
    program = Program(Rewriter(model).run(), x, 2, {})
    (part,) = program.parts
    with_shortcut = [step for step in part.steps if step.shortcut]
    assert any(step.y_ld > step.shortcut_ld for step in with_shortcut)
    assert error(program.run(x), model, x) < TOLERANCE


# channels, kernel, stride, padding, dilation, height, width
DEPTHWISE = {
    "3x3": (50, 3, 1, 1, 1, 14, 13),
    "3x3, windows of all widths": (16, 3, 1, 1, 1, 5, 56),
    "3x3 with stride": (50, 3, 2, 1, 1, 15, 29),
    "5x5": (24, 5, 1, 2, 1, 7, 7),
    "5x5 with stride": (72, 5, 2, 2, 1, 28, 27),
    "5x5 without padding": (20, 5, 1, 0, 1, 12, 40),
    "7x7": (40, 7, 1, 3, 1, 10, 31),
    "7x7 with stride": (33, 7, 2, 3, 1, 16, 16),
    "9x9": (33, 9, 1, 4, 1, 14, 23),
    "9x9 with stride": (17, 9, 2, 4, 1, 19, 16),
    "larger than the map": (17, 7, 1, 3, 1, 2, 3),
    "dilated": (20, 3, 1, 2, 2, 11, 12),
    "1x5": (20, (1, 5), 1, (0, 2), 1, 6, 12),
    "4x4 with stride of 3": (20, 4, 3, 1, 1, 17, 12),
    "many channels": (1300, 3, 1, 1, 1, 7, 7),
}


def depthwise(name: str) -> tuple[nn.Conv2d, Tensor]:
    c, kernel, stride, padding, dilation, h, w = DEPTHWISE[name]
    conv = nn.Conv2d(c, c, kernel, stride, padding, dilation, c)
    return conv, torch.rand(3, c, h, w) - 0.3


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_convolutions(name: str, threads: int) -> None:
    """Alone, and with the means of what they write taken from their own sums."""
    conv, x = depthwise(name)
    model = nn.Sequential(conv, nn.ReLU())
    assert error(native(model, x, threads), model, x) < TOLERANCE
    means = nn.Sequential(copy.deepcopy(conv).float(), nn.Hardswish(), nn.AdaptiveAvgPool2d(1))
    program = Program(Rewriter(means.eval()).run(), x, threads, {})
    assert summing_convolutions(program.parts[0].steps) == 1
    assert error(program.run(x), means, x) < TOLERANCE


class Bottleneck(nn.Module):
    """As in MobileNetV3 and EfficientNet: the gates scale the input of the last convolution."""

    def __init__(self, kernel: int, stride: int, se: bool, shortcut: bool) -> None:
        super().__init__()
        self.expand = nn.Conv2d(16, 88, 1)
        self.depthwise = nn.Conv2d(88, 88, kernel, stride, kernel // 2, groups=88)
        self.fc1, self.fc2 = nn.Conv2d(88, 12, 1), nn.Conv2d(12, 88, 1)
        self.project = nn.Conv2d(88, 16, 1)
        self.se, self.shortcut = se, shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.silu(self.expand(x))
        y = torch.nn.functional.hardswish(self.depthwise(y))
        if self.se:
            squeezed = torch.nn.functional.adaptive_avg_pool2d(y, 1)
            gates = self.fc2(torch.nn.functional.silu(self.fc1(squeezed)))
            y = torch.nn.functional.hardsigmoid(gates) * y
        y = self.project(y)
        return x + y if self.shortcut else y


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [2, 7, 14])
def test_small_maps_of_one_image(size: int, threads: int) -> None:
    """Rows or panels are shared out; steps of a single task run behind each other in one thread."""
    wide = [nn.Conv2d(16, 480, 1), nn.ReLU(), nn.Conv2d(480, 160, 1)]
    model = nn.Sequential(Bottleneck(5, 1, True, True), *wide).eval()
    x = torch.randn(1, 16, size, size)
    program = Program(Rewriter(model, x).run(), x, threads, {})
    assert len(program.parts) == 1
    first = program.run(x)
    assert all(torch.equal(program.run(x), first) for _ in range(20))
    assert error(first, model, x) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 5])
def test_gates_scale_the_input_of_a_convolution(images: int) -> None:
    model = Bottleneck(3, 1, True, True).eval()
    x = torch.randn(images, 16, 14, 13)
    program = Program(Rewriter(model, x).run(), x, 2, {})
    (part,) = program.parts
    assert [Kind(step.kind) for step in part.steps].count(Kind.POINTWISE) == 0
    assert sum(step.input_gates_ld > 0 for step in part.steps) == 1
    assert summing_convolutions(part.steps) == 1
    assert error(program.run(x), model, x) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("se", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_chains_of_convolutions(
    kernel: int, stride: int, se: bool, images: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "_MOVED", math.inf)  # whether it pays or not
    model = Bottleneck(kernel, stride, se, stride == 1).eval()
    x = torch.randn(images, 16, 71, 74)
    program = Program(Rewriter(model, x).run(), x, threads, {})
    (part,) = program.parts
    lengths = [step.steps for step in part.steps if step.kind == Kind.CHAIN]
    assert lengths == [2 if se else 3] * len(lengths) != []
    assert error(program.run(x), model, x) < TOLERANCE
    assert torch.equal(program.run(x), program.run(x))


@torch.no_grad()
def test_a_chain_begins_with_patches_and_ends_in_a_concat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "_MOVED", math.inf)

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, 2, 1)
            self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
            self.project = nn.Conv2d(32, 20, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.depthwise(torch.relu(self.stem(x))))
            pooled = torch.nn.functional.max_pool2d(x, 3, 2, 1)
            return torch.cat([pooled, self.project(y)], 1)

    model, x = Stem().eval(), torch.randn(2, 3, 190, 201)
    program = Program(Rewriter(model, x).run(), x, 2, {})
    (part,) = program.parts
    assert sum(step.kind == Kind.CHAIN for step in part.steps) > 0
    assert error(program.run(x), model, x) < TOLERANCE
