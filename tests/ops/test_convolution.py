"""Convolutions: kernels against float64, the operator inside PyTorch, layers that use it."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import error
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from senet import kernels
from senet.errors import UserError
from senet.nn.convolution import convolve as through
from senet.ops import convolution
from senet.ops.convolution import Passes, convolve, passes, rule, use

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LAST = torch.channels_last
pytestmark = pytest.mark.skipif(kernels.LIBRARY is None, reason="the kernels are not built")

# N, C, H, W, K, padding: tiles cut off at the edges, groups of channels that fill no chunk.
SHAPES = [
    (2, 16, 8, 8, 16, 1),
    (3, 32, 7, 9, 48, 1),
    (1, 80, 14, 5, 144, 1),
    (2, 16, 6, 6, 160, 0),
    (2, 48, 5, 7, 16, 2),
    (70, 64, 4, 4, 64, 1),
    (2, 144, 9, 6, 160, 1),  # weights that are transformed piece by piece
    (1, 16, 1, 1, 32, 1),
]


ALL, NONE, WEIGHT = Passes(True, True, True), Passes(), Passes(weight=True)
MAPS = Passes(True, True)


def numbers(N: int, C: int, H: int, W: int, K: int, **options: Any) -> tuple[Tensor, Tensor]:
    """x and weights, channels_last, that require gradients."""
    torch.manual_seed(N * C + K)
    x, weight = torch.randn(N, C, H, W, **options), torch.randn(K, C, 3, 3, **options)
    return tuple(t.contiguous(memory_format=LAST).requires_grad_() for t in (x, weight))


def gradients(f: Callable[..., Tensor], x: Tensor, weight: Tensor, padding: int) -> list[Tensor]:
    """y, and the gradients of x and the weights for one of y that is the same for all f."""
    y = f(x, weight, padding=padding)
    torch.manual_seed(1)
    gradient = torch.randn(y.shape).to(y.dtype).contiguous(memory_format=LAST)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), gradient)]


def exact(x: Tensor, weight: Tensor, padding: int) -> list[Tensor]:
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    return gradients(torch.conv2d, *wide, padding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pass_against_float64(shape: tuple[int, ...]) -> None:
    *sizes, padding = shape
    x, weight = numbers(*sizes)
    with use("senet"):
        assert all(passes(tuple(x.shape), tuple(weight.shape), (1, 1), (padding, padding)))
        found = gradients(convolve, x, weight, padding)
    for ours, expected in zip(found, exact(x, weight, padding), strict=True):
        assert ours.shape == expected.shape
        assert ours.is_contiguous(memory_format=LAST)
        assert error(ours, expected) < 3e-6


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (3, 2)])
def test_weights_of_one_by_one(stride: int, groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 96, 8, 7).contiguous(memory_format=LAST)
    weight = torch.randn(160, 96 // groups, 1, 1).requires_grad_()
    sizes = tuple(x.shape), tuple(weight.shape), (stride, stride), (0, 0), groups
    with use("senet"):
        assert passes(*sizes) == WEIGHT
        y = convolve(x, weight, stride=stride, groups=groups)
        gradient = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, weight, gradient)
    wide = weight.detach().double().requires_grad_()
    y = torch.conv2d(x.double(), wide, None, stride, 0, 1, groups)
    (expected,) = torch.autograd.grad(y, wide, gradient.double())
    assert error(found, expected) < 1e-6


def test_errors_are_about_twice_those_of_a_plain_sum() -> None:
    """Root mean squares; the plain sum adds one float32 product after the other."""
    N, C, side, K = 2, 64, 16, 32
    x, weight = numbers(N, C, side, side, K)
    with use("senet"):
        ours = gradients(convolve, x, weight, 1)
    expected = exact(x, weight, 1)
    torch.manual_seed(1)
    gradient = torch.randn(expected[0].shape)

    def patches(t: Tensor) -> Tensor:  # (N, channels * 9, positions)
        return nn.functional.unfold(t, 3, padding=1)

    def running(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(a[0].shape[:1] + b[0].shape[1:])
        for left, right in zip(a, b, strict=True):
            total += left * right
        return total

    x, weight = x.detach(), weight.detach()
    mirrored = weight.flip(2, 3).transpose(0, 1)
    plain = []
    for t, w in ((x, weight), (gradient, mirrored)):
        columns = patches(t).permute(1, 0, 2).flatten(1)  # (terms, N * positions)
        sums = running(w.flatten(1).T.unsqueeze(2), columns.unsqueeze(1))
        plain.append(sums.view(len(w), N, side, side).transpose(0, 1))
    rows = patches(x).transpose(1, 2).flatten(0, 1)  # (terms, C * 9)
    columns = gradient.flatten(2).transpose(1, 2).flatten(0, 1)  # (terms, K)
    plain.append(running(columns.unsqueeze(2), rows.unsqueeze(1)).view(weight.shape))
    for mine, theirs, right in zip(ours, plain, expected, strict=True):
        ours_rms, plain_rms = ((t.double() - right).square().mean().sqrt() for t in (mine, theirs))
        assert 0 < ours_rms <= 2.5 * plain_rms


def test_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    for sizes in ((9, 96, 13, 12, 80), (5, 144, 13, 12, 160)):  # weights kept, and piece by piece
        x, weight = numbers(*sizes)
        results = []
        try:
            with use("senet"):
                for count in (1, 2, 3, 5, 2):
                    torch.set_num_threads(count)
                    results.append(gradients(convolve, x, weight, 1))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


def test_more_tiles_than_are_transformed_at_once() -> None:
    """6 million transformed inputs are; these have 38 images of 36 tiles of 36 times 128."""
    x, weight = numbers(38, 128, 24, 24, 144)
    with use("senet"):
        found = gradients(convolve, x, weight, 1)
    for ours, expected in zip(found, gradients(torch.conv2d, x, weight, 1), strict=True):
        assert error(ours, expected) < 1e-5


PARITY = """
import torch
from senet import kernels
import test_convolution as t
print(kernels.instruction_set())
for shape in t.SHAPES:
    t.test_every_pass_against_float64(shape)
for case in (1, 1), (2, 1), (3, 2):
    t.test_weights_of_one_by_one(*case)
for shape in t.GROUPED_SHAPES:
    t.test_groups_against_float64(shape)
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (HERE, ROOT / "src")))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("isa", kernels.ISAS)
def test_every_instruction_set(isa: str) -> None:
    result = run_python(PARITY, SENET_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] in kernels.ISAS[kernels.ISAS.index(isa) :]


def test_sanitizers(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan over every kernel, on maps without a byte to spare."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    driver = tmp_path / "driver"
    folder = ROOT / "src/senet/kernels/convolution"
    avx2 = " -mavx2 -mfma -mbmi2" if kernels.instruction_set() != "baseline" else ""
    flags = f"-std=c++17 -O1 -fopenmp -Wall -Wextra -Werror{avx2}"
    sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    source = HERE / "convolution_driver.cpp"
    command = f"{compiler} {flags} {sanitizers} -I{folder} {source} -o {driver}"
    built = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([driver], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "22 passes\n"


def test_layouts_and_gradients_without_memory_of_their_own() -> None:
    """Weights in another order, and what a sum sends back, a value with strides of 0."""
    x, weight = numbers(2, 32, 6, 6, 16)
    plain = weight.detach().contiguous().requires_grad_()
    with use("senet"):
        for w in (weight, plain):
            dx, dw = torch.autograd.grad(convolve(x, w, padding=1).sum(), (x, w))
            ones = torch.autograd.grad(torch.conv2d(x, w, padding=1).sum(), (x, w))
            assert dw.stride() == w.stride()
            assert error(dx, ones[0]) < 1e-6
            assert error(dw, ones[1]) < 1e-6
        contiguous = x.detach().contiguous()
        assert torch.equal(convolve(contiguous, plain), torch.conv2d(contiguous, plain))


# opcheck itself reads .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_schema_and_opcheck() -> None:
    assert str(torch.ops.senet.convolution.default._schema) == (
        "senet::convolution(Tensor x, Tensor weight, int[] stride, int[] padding, int groups) "
        "-> Tensor y"
    )
    for sizes, stride, name in (
        ((2, 16, 6, 6, 16), [1, 1], "senet"),
        ((2, 3, 7, 6, 5), [2, 1], "auto"),
    ):
        x, weight = numbers(*sizes)
        with use(name):
            opcheck(torch.ops.senet.convolution.default, (x, weight, stride, [1, 1], 1))
            y = torch.ops.senet.convolution(x.detach(), weight.detach(), stride, [1, 1], 1)
            backward = (torch.randn_like(y), x.detach(), weight.detach(), stride, [1, 1], 1)
            for wanted in ([True, True], [False, True]):
                opcheck(torch.ops.senet.convolution_backward.default, (*backward, wanted))


def test_gradcheck_and_second_derivatives() -> None:
    x, weight = numbers(1, 2, 4, 3, 2, dtype=torch.float64)

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x, weight, stride=(2, 1), padding=1, groups=2 // weight.shape[1])

    for given in (weight, weight.detach()[:, :1].requires_grad_()):
        assert torch.autograd.gradcheck(f, (x, given))
        assert torch.autograd.gradgradcheck(f, (x, given))


def test_second_derivatives_of_what_the_kernels_computed() -> None:
    x, weight = numbers(2, 16, 4, 4, 16)
    found = []
    for f in (convolve, torch.conv2d):
        with use("senet"):
            (dx,) = torch.autograd.grad(
                f(x, weight, padding=1).square().sum(), x, create_graph=True
            )
            found.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    for ours, expected in zip(*found, strict=True):
        assert error(ours, expected) < 1e-5


def test_transforms_autocast_and_compile_take_pytorchs() -> None:
    x, weight = (t.detach() for t in numbers(3, 16, 6, 6, 16))
    with use("senet"):
        each = torch.func.vmap(lambda one: convolve(one[None], weight, padding=1)[0])(x)
        assert error(each, torch.conv2d(x, weight, padding=1)) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert convolve(x, weight, padding=1).dtype is torch.bfloat16
        torch._dynamo.reset()
        compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
        assert error(compiled(x, weight, padding=1), convolve(x, weight, padding=1)) < 1e-6


def test_flops_are_those_of_a_convolution() -> None:
    x, weight = numbers(2, 16, 6, 5, 32)
    counts = []
    for f in (convolve, torch.conv2d):
        with FlopCounterMode(display=False) as counter:
            f(x, weight, padding=1).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 2 * 32 * 16 * 9 * 6 * 5] * 2


def test_what_is_refused() -> None:
    x, weight = numbers(1, 2, 4, 4, 2)
    with pytest.raises(UserError, match=r"stride is 0; give one or two integers of at least 1"):
        convolve(x, weight, stride=0)
    with pytest.raises(UserError, match=r"padding is \(1, -1\)"):
        convolve(x, weight, padding=(1, -1))
    with pytest.raises(UserError, match=r"x has shape \(1, 2, 4, 4\) and weight \(2, 1, 3, 3\)"):
        convolve(x, weight[:, :1])
    with pytest.raises(UserError, match=r"in 2 groups they must be .* a multiple of the groups"):
        convolve(x, torch.zeros(3, 1, 3, 3), groups=2)
    with pytest.raises(UserError, match="groups is 0; give an integer of at least 1"):
        convolve(x, weight, groups=0)
    with pytest.raises(UserError, match="'fast'; choose one of auto, direct, torch, senet"):
        use("fast")
    result = run_python("import senet.ops.convolution", SENET_CONVOLUTION="fast")
    assert "the environment's SENET_CONVOLUTION is 'fast'" in result.stderr


RULE = [  # x, K, kernel, stride, padding: avx512, avx2
    ((8, 64, 56, 56), 64, 3, 1, 1, ALL, ALL),
    ((8, 256, 14, 14), 256, 3, 1, 1, ALL, ALL),
    ((8, 512, 7, 7), 512, 3, 1, 1, ALL, ALL),
    ((128, 32, 14, 14), 32, 3, 1, 1, ALL, ALL),
    ((128, 16, 28, 28), 16, 3, 1, 1, ALL, ALL),
    ((1, 64, 14, 14), 64, 3, 1, 1, NONE, NONE),  # few positions
    ((32, 64, 5, 5), 64, 3, 1, 1, WEIGHT, WEIGHT),  # 25 of the 64 in a map's tiles
    ((8, 64, 56, 56), 64, 3, 2, 1, NONE, NONE),
    ((8, 64, 56, 56), 64, 3, 1, 3, NONE, NONE),
    ((8, 64, 56, 56), 64, 1, 1, 0, NONE, NONE),
    ((8, 2048, 7, 7), 512, 1, 1, 0, WEIGHT, NONE),
    ((8, 1024, 14, 14), 2048, 1, 2, 0, WEIGHT, NONE),
    ((8, 2048, 7, 7), 512, 1, 1, 1, NONE, NONE),
    ((64, 2048, 7, 7), 512, 1, 1, 0, NONE, NONE),  # many positions
    ((8, 40, 56, 56), 64, 3, 1, 1, NONE, NONE),
    ((8, 2048, 14, 14), 1024, 3, 1, 1, ALL, ALL),
    ((8, 2064, 14, 14), 1024, 3, 1, 1, NONE, NONE),  # workspace
    ((8, 64, 2, 1), 64, 3, 1, 0, NONE, NONE),  # smaller than the kernel
]
GROUPED = [  # x, K, groups: avx512, avx2
    ((8, 128, 56, 56), 128, 32, ALL, ALL),
    ((8, 256, 28, 28), 256, 32, WEIGHT, MAPS),
    ((8, 1024, 7, 7), 1024, 32, WEIGHT, ALL),
    ((8, 256, 14, 14), 512, 2, ALL, ALL),
    ((8, 64, 14, 14), 64, 32, NONE, NONE),  # two channels
    ((8, 64, 14, 14), 64, 64, NONE, NONE),
    ((8, 24, 14, 14), 24, 3, NONE, NONE),  # an odd number of groups of eight
    ((8, 64, 14, 14), 128, 8, NONE, NONE),  # eight to sixteen
]


@pytest.mark.parametrize("case", RULE, ids=str)
def test_the_rule(case: tuple[Any, ...]) -> None:
    x, K, kernel, stride, padding, *expected = case
    sizes = (x, (K, x[1], kernel, kernel), (stride, stride), (padding, padding))
    assert [rule._passes(*sizes, 1, "auto", isa) for isa in ("avx512", "avx2")] == expected
    direct = NONE if kernel == 3 else expected[0]
    assert rule._passes(*sizes, 1, "direct", "avx512") == direct
    for choice, isa in (("auto", "baseline"), ("auto", ""), ("torch", "avx512"), ("senet", "")):
        assert rule._passes(*sizes, 1, choice, isa) == NONE


@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_the_rule_of_groups(case: tuple[Any, ...]) -> None:
    x, K, groups, *expected = case
    sizes = (x, (K, x[1] // groups, 3, 3), (1, 1), (1, 1), groups)
    assert [rule._passes(*sizes, "auto", isa) for isa in ("avx512", "avx2")] == expected


GROUPED_SHAPES = [  # N, C, H, W, K, groups
    (2, 32, 9, 7, 32, 8),  # groups of 4: four together
    (2, 64, 9, 7, 64, 8),
    (3, 96, 8, 6, 192, 3),
    (2, 96, 5, 5, 160, 2),  # outputs that fill no tile
    (2, 512, 7, 7, 512, 32),
    (1, 288, 9, 5, 320, 2),  # weights that are transformed piece by piece
]


@pytest.mark.parametrize("sizes", GROUPED_SHAPES, ids=str)
def test_groups_against_float64(sizes: tuple[int, ...]) -> None:
    N, C, H, W, K, groups = sizes
    x, weight = numbers(N, C, H, W, K)
    weight = weight.detach()[:, : C // groups].contiguous(memory_format=LAST).requires_grad_()

    def grouped(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, padding: f(x, weight, padding=padding, groups=groups)

    with use("senet"):
        assert all(passes(tuple(x.shape), tuple(weight.shape), (1, 1), (1, 1), groups))
        found = gradients(grouped(convolve), x, weight, 1)
        plain = weight.detach().contiguous().requires_grad_()
        other = gradients(grouped(convolve), x, plain, 1)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = gradients(grouped(torch.conv2d), *wide, 1)
    for ours, theirs, right in zip(found, other, expected, strict=True):
        assert error(ours, right) < 5e-6
        assert torch.equal(ours, theirs)
    assert found[2].stride() == weight.stride()
    assert other[2].stride() == plain.stride()


def layer_and_input() -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3, padding=1, bias=False).to(memory_format=LAST)
    return layer, torch.randn(2, 16, 6, 6).contiguous(memory_format=LAST)


def runs_ours(layer: nn.Module, x: Tensor) -> bool:
    """Whether `through` hands over to the operator; either way it gives the layer's output."""
    y = through(layer, x)
    assert error(y.float(), layer(x)) < 1e-2
    return "Convolution" not in type(y.grad_fn).__name__ and not torch.equal(y, layer(x))


def test_plain_layers_go_through_the_kernels() -> None:
    layer, x = layer_and_input()
    with use("senet"):
        assert runs_ours(layer, x)
        assert runs_ours(copy.deepcopy(layer), x)
        layer.requires_grad_(False)
        assert not torch.equal(through(layer, x), layer(x))  # forward alone
    with use("torch"):
        assert torch.equal(through(layer, x), layer(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(32))),
        lambda layer: setattr(layer, "padding_mode", "circular"),
        lambda layer: setattr(layer, "padding", "same"),
        lambda layer: layer.__class__.__init__(layer, 16, 32, 3, padding=2, dilation=2, bias=False),
        lambda layer: layer.__class__.__init__(layer, 16, 32, 3, padding=1, groups=2, bias=False),
        lambda layer: layer.__class__.__init__(layer, 16, 16, 3, padding=1, groups=16, bias=False),
    ],
)
def test_other_layers_run_themselves(change: Callable[[nn.Conv2d], object]) -> None:
    layer, x = layer_and_input()
    change(layer)
    with use("senet"):
        assert torch.equal(through(layer, x), layer(x))


def test_inputs_that_layers_take_themselves() -> None:
    layer, x = layer_and_input()
    with use("senet"):
        for given in (x.contiguous(), x[0]):
            assert torch.equal(through(layer, given), layer(given))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(through(layer, x), layer(x))
        with FlopCounterMode(display=False) as counter:
            through(layer, x)
        assert "Conv2d" in counter.get_flop_counts()  # the layer's own line
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            assert torch.equal(through(layer, x), layer(x))
        finally:
            handle.remove()
    assert convolution.chosen() == (os.environ.get("SENET_CONVOLUTION") or "auto")
