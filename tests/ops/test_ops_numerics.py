"""Hard numbers: large means, constants, denormals, infinities, empty and single-value batches."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from ops_cases import FAST, PARAMETERS, Case, apply, inputs, run
from tolerances import error
from torch import Tensor

from senet import ops

LAYOUTS = ("channels_last", "contiguous")


def normalize(x: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """BN alone by the operator: y, the batch mean and the unbiased batch variance."""
    C = x.shape[1]
    mean, var = torch.zeros(C, dtype=x.dtype), torch.zeros(C, dtype=x.dtype)
    chosen = {"training": True, "momentum": 1.0, "eps": 1e-5, "relu": False, **options}
    y = ops.bn_se_add_relu(x, None, None, None, mean, var, **chosen)
    return y, mean, var


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", ["noise", "one outlier", "step", "first pixel differs"])
def test_mean_far_above_the_deviation(implementation: str, layout: str, pattern: str) -> None:
    """E[x²] - E[x]² would lose every digit here; the variance keeps four or more."""
    x = torch.randn(4, 24, 40, 50, dtype=torch.float64)
    if pattern == "one outlier":
        x = x * 0.01
        x[2, :, 17, 3] += 300
    elif pattern == "step":
        x[:, :, :20] += 1000
    elif pattern == "first pixel differs":
        x[:, :, 0, 0] -= 1e4
    x = (x + 1e4).float()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    # By hand in float64: an oracle shares no code with what it judges.
    mean = x.double().mean((0, 2, 3))
    centred = x.double() - mean[:, None, None]
    squares = centred.square().sum((0, 2, 3))
    pixels = x.numel() // x.shape[1]
    var = squares / (pixels - 1)
    expected = centred / (squares / pixels + 1e-5).sqrt()[:, None, None]
    with ops.use(implementation):
        y, found_mean, found_var = normalize(x)
    assert error(found_mean, mean) < 1e-6
    assert float(((found_var.double() - var) / var).abs().max()) < 1e-4
    # the mean itself is rounded to float32: 1e4 * 6e-8 / std, as in PyTorch
    torch_error = error(F.batch_norm(x, None, None, training=True), expected)
    # and inv_std has half the error that the pivot's bound leaves to the variance
    assert error(y, expected) <= 2 * torch_error + 2e-6


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 12345.678, 1e-40, 3e38])
def test_constant_channels_become_the_bias(implementation: str, layout: str, value: float) -> None:
    case = Case(C=20, spatial=(9, 11), layout=layout, gated=False, shortcut="none", relu=False)
    t = inputs(case)
    t["x"].fill_(value)
    results = run(implementation, case, t)
    mean = t["running_mean"] * 0.9 + value * 0.1
    assert error(results["running_mean"], mean) < 1e-6
    assert torch.allclose(results["running_var"], t["running_var"] * 0.9, rtol=1e-6)
    assert torch.equal(results["y"], t["bias"][:, None, None].expand_as(results["y"]))
    assert all(results[name].isfinite().all() for name in ("x", "weight", "bias"))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_is_never_negative(implementation: str, layout: str) -> None:
    for scale, shift in itertools.product((0.0, 1e-7, 1e-3), (1.0, 1e4, 3e7, -1e15)):
        x = torch.randn(3, 20, 17, 9) * scale * abs(shift) + shift
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        with ops.use(implementation):
            var = normalize(x)[2]
        assert (var >= 0).all()


@pytest.mark.parametrize("implementation", FAST)
def test_denormals_are_kept(implementation: str) -> None:
    x = torch.full((2, 16, 4, 4), 1e-41)
    rest = (None, None, torch.zeros(16), torch.ones(16))
    with ops.use(implementation):
        y = ops.bn_se_add_relu(x, x, *rest, training=False, momentum=0.1, eps=0.0)
    assert torch.equal(y, x + x)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_nonfinite_values_spread_as_in_pytorch(
    implementation: str, layout: str, value: float, place: tuple[int, int, int], training: bool
) -> None:
    """One bad number of channel 2 reaches what it reaches in F.batch_norm + add + relu, no more.

    As on the CPU: PyTorch's CUDA kernels for channels_last give NaN for the mean of a channel with
    an infinity, all others give the infinity.
    """
    case = Case(C=20, gated=False, layout=layout, training=training)
    t = inputs(case)
    n, i, j = place
    t["x"][n, 2, i, j] = value
    on_cpu = {name: tensor.to("cpu", copy=True) for name, tensor in t.items()}
    running = [on_cpu["running_mean"], on_cpu["running_var"]]
    x = on_cpu["x"].requires_grad_()
    v = F.batch_norm(x, *running, on_cpu["weight"], on_cpu["bias"], training, 0.1, 1e-5)
    expected = F.relu(v + on_cpu["shortcut"])
    expected.backward(on_cpu["gradient"])
    found = {k: v.cpu() for k, v in run(implementation, case, t, ("x",)).items()}
    for name, value_ in (
        ("y", expected),
        ("running_mean", running[0]),
        ("running_var", running[1]),
    ):
        assert torch.equal(found[name].isnan(), value_.isnan()), name
        assert torch.equal(found[name].isinf(), value_.isinf()), name
    assert torch.equal(found["x"].isfinite(), x.grad.isfinite())


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_passes_the_relu(implementation: str, dtype: torch.dtype) -> None:
    for shortcut in ("none", "plain", "normalized"):
        case = Case(C=20, gated=False, training=False, shortcut=shortcut, dtype=dtype)
        t = inputs(case)
        t["x"][1, 3, 2, 4] = math.nan
        found = run(implementation, case, t)
        assert found["y"].isnan().nonzero().tolist() == [[1, 3, 2, 4]]
        # threshold_backward passes the gradient of a NaN on
        assert found["x"][1, 3, 2, 4] != 0


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_nan_in_the_map_reaches_its_image_through_the_gate(implementation: str) -> None:
    x = torch.randn(3, 8, 4, 4)
    x[1, 2, 0, 0] = math.nan
    with ops.use(implementation):
        y = ops.squeeze_excite(x, torch.randn(2, 8), None, torch.randn(8, 2), None)
    assert y[1].isnan().all()
    assert not y[::2].isnan().any()


@pytest.mark.parametrize("implementation", ["reference", *FAST, "auto"])
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (3, 6, 0, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_maps(implementation: str, shape: tuple[int, ...], training: bool) -> None:
    """As nn.BatchNorm2d: an empty result, zero gradients, statistics as they were."""
    case = Case(N=shape[0], C=6, spatial=shape[2:], training=training)
    t = inputs(case)
    found = run(implementation, case, t)
    assert found["y"].shape == shape
    assert torch.equal(found["running_mean"], t["running_mean"])
    for name in ("weight", "bias", "w1", "b1", "w2", "b2"):
        assert (found[name] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_single_value_per_channel(implementation: str) -> None:
    case = Case(N=1, spatial=(1, 1))
    t = inputs(case)
    with pytest.raises(ValueError, match="more than 1 value") as expected:
        torch.nn.BatchNorm2d(case.C)(t["x"])
    with ops.use(implementation), pytest.raises(ValueError, match="more than 1 value") as found:
        apply(t, case)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("implementation", FAST)
def test_large_float16_maps_do_not_overflow(implementation: str) -> None:
    """A sum of 112x112 values of 60 leaves float16's range; their mean does not."""
    x = torch.full((2, 8, 112, 112), 60.0, dtype=torch.float16)
    w1, w2 = torch.full((2, 8), 0.01), torch.full((8, 2), 0.01)
    with ops.use("auto" if implementation == "cpu" else implementation):
        y = ops.squeeze_excite(x, w1, None, w2, None)
    expected = 60 * torch.sigmoid(torch.tensor(2 * 0.01 * 8 * 60 * 0.01))
    assert error(y, expected.expand_as(y)) < 2**-11


@pytest.mark.parametrize("implementation", FAST)
def test_statistics_without_buffers_are_the_batchs(implementation: str) -> None:
    """running_mean None: nn.BatchNorm2d(track_running_stats=False) in evaluation."""
    t = inputs(Case(dtype=torch.float64))
    x = t["x"]
    with ops.use(implementation):
        y = ops.bn_se_add_relu(
            x, None, t["weight"], t["bias"], None, None, training=False, momentum=0.1, eps=1e-5
        )
    expected = F.relu(F.batch_norm(x, None, None, t["weight"], t["bias"], training=True, eps=1e-5))
    assert error(y, expected) < 1e-12


@pytest.mark.parametrize("implementation", FAST)
def test_types_of_maps_and_parameters_may_differ(implementation: str) -> None:
    """x + shortcut promotes as PyTorch's addition does; parameters of 16 bits are widened."""
    t = inputs(Case(dtype=torch.bfloat16))
    low = {k: v.bfloat16() for k, v in t.items()}
    results = {}
    for name in ("reference", implementation):
        low = {k: v.bfloat16().requires_grad_(k in PARAMETERS) for k, v in t.items()}
        with ops.use(name):
            y = apply({**low, "shortcut": t["shortcut"].float()}, Case())
        assert y.dtype == torch.float32
        y.backward(t["gradient"].float())
        results[name] = [y, low["running_mean"], low["w1"].grad, low["weight"].grad]
    for found, expected in zip(*results.values(), strict=True):
        assert found.dtype == expected.dtype
        assert error(found, expected) < 2**-7


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_statistics_move_as_in_pytorch(momentum: float, dtype: torch.dtype) -> None:
    """The kernel moves them itself, in whatever type and layout they are kept."""
    x = torch.randn(4, 24, 5, 7) * 3 + 2
    r = torch.randn(4, 24, 5, 7) - 1
    plain = [torch.nn.BatchNorm2d(24, momentum=momentum) for _ in range(2)]
    wide = torch.ones(24, 2, dtype=dtype), torch.ones(24, 2, dtype=dtype)
    ours = [
        ops.BatchNorm(None, None, wide[0][:, 0], wide[1][:, 0], momentum),
        ops.BatchNorm(
            None, None, torch.ones(24, dtype=dtype), torch.ones(24, dtype=dtype), momentum
        ),
    ]
    for bn in plain:
        bn.running_mean.fill_(1)
    for bn, t in zip(plain, (x, r), strict=True):
        bn(t)
    y = ops.bn_se_add_relu(
        x, r, *ours[0][:4], training=True, momentum=momentum, eps=1e-5, shortcut_norm=ours[1]
    )
    assert y.shape == x.shape
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    for bn, norm in zip(plain, ours, strict=True):
        for expected, found in ((bn.running_mean, norm[2]), (bn.running_var, norm[3])):
            assert found.dtype == dtype
            torch.testing.assert_close(found.to(torch.float32), expected, **tolerance)
    assert torch.equal(wide[0][:, 1], torch.ones(24, dtype=dtype))  # the neighbours
