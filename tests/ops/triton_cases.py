"""What only the Triton kernels have to show; `test_ops_triton.py` and `make test-gpu` run it."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ops_cases import DEVICE, Case, apply, inputs, oracle, run
from test_ops_operators import CONFIGURATIONS, NON_LEAF, tail_arguments
from tolerances import assert_close, error
from torch import Tensor, nn
from torch.library import opcheck

from senet import ops
from senet.errors import UserError
from senet.inference import optimize
from senet.inference.modules import FusedConv
from senet.networks.create import create_model
from senet.ops.activations import LINEAR, RELU
from senet.ops.triton import tail as triton
from senet.ops.triton import tiling as triton_tiling

pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the kernels' functions ran."""
    names: list[str] = []
    for name in ("forward", "backward"):
        real = getattr(triton, name)

        def recorded(*arguments: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            names.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(triton, name, recorded)
    return names


def test_the_kernels_run(called: list[str]) -> None:
    run("triton", Case())
    assert called == ["forward", "backward"]
    with ops.use("algebra"):
        run("algebra", Case())
    assert len(called) == 2


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(
    ("programs", "most"), [(1024, 32), (1, 32), (1, 2)], ids=["chunks", "tiles", "both"]
)
def test_chunks_and_tiles_of_an_image(
    monkeypatch: pytest.MonkeyPatch, layout: str, programs: int, most: int
) -> None:
    """A pass in several programs an image, in several tiles a program, and in both."""
    monkeypatch.setattr(triton_tiling, "_PROGRAMS", programs)
    monkeypatch.setattr(triton_tiling, "_MOST_TILES", most)
    triton_tiling.tiling.cache_clear()
    sizes = {"N": 2, "C": 9, "spatial": (29, 53), "hidden": 3, "layout": layout}
    cut = triton_tiling.tiling(2, 9, 29 * 53, layout == "channels_last", torch.float32, most)
    assert (cut.splits > 1, cut.tiles > 1) == (most == 2 or programs > 1, programs == 1)
    case = Case(shortcut="plain" if layout == "channels_last" else "normalized", **sizes)
    assert_close(run("triton", case), oracle(case), case.dtype, case)
    triton_tiling.tiling.cache_clear()


def test_float64_in_unusual_strides() -> None:
    for shortcut in ("none", "plain", "normalized"):
        layout = "permuted" if shortcut == "plain" else "strided"
        case = Case(N=2, C=9, dtype=torch.float64, layout=layout, shortcut=shortcut)
        assert_close(run("triton", case), oracle(case), case.dtype, case)


def test_same_bits_every_time() -> None:
    case = Case(N=2, C=9, spatial=(19, 33), hidden=3, shortcut="normalized")
    first = list(run("triton", case).values())
    for _ in range(1 if DEVICE == "cpu" else 20):
        assert all(map(torch.equal, run("triton", case).values(), first))


def test_tiles_cover_any_map_within_the_limits() -> None:
    """Every pixel is in one chunk, tiles are bounded, and 64-bit offsets where they are needed."""
    for C in (1, 3, 64, 2048, 300_000):
        for P in (1, 49, 3136, 12_544, 2**24):
            for order in (True, False):
                cut = triton_tiling.tiling(7, C, P, order, torch.bfloat16)
                block_p, block_c = cut.constants["BLOCK_P"], cut.constants["BLOCK_C"]
                assert block_p * block_c <= 2048
                assert cut.tiles <= 32
                assert (cut.splits - 1) * cut.chunk < P <= cut.splits * cut.chunk
                assert cut.programs == 7 * cut.splits * -(-C // block_c)
                far = block_p * C if order else block_c * P
                assert cut.constants["WIDE"] == (far > 2**31 - 1)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("sizes", [(70_000, 3000, 200), (3, 2**20, 5000), (2, 3, 2**32)], ids=str)
def test_offsets_beyond_32_bits(channels_last: bool, sizes: tuple[int, int, int]) -> None:
    """Where tiles lie in maps of more than 2^31 elements, which nobody has to allocate for it."""
    from offsets_kernel import BLOCK_C, BLOCK_P, offsets_kernel

    N, C, P = sizes
    n, c, p = N - 1, (C - 1) // BLOCK_C * BLOCK_C, min(P, 2**31 - 1) - BLOCK_P
    found = torch.zeros(BLOCK_P, BLOCK_C, dtype=torch.int64, device=DEVICE)
    wide = max(BLOCK_P * C, BLOCK_C * P) > 2**31 - 1
    offsets_kernel[(1,)](found, n, c, p, C, P, CHANNELS_LAST=channels_last, WIDE=wide)
    pixel = p + torch.arange(BLOCK_P, device=DEVICE)[:, None]
    channel = c + torch.arange(BLOCK_C, device=DEVICE)[None, :]
    within = pixel * C + channel if channels_last else channel * P + pixel
    expected = torch.where((pixel < P) & (channel < C), n * C * P + within, -1)
    assert expected.max() > 2**31
    assert torch.equal(found, expected)


@NON_LEAF
@pytest.mark.parametrize(
    "configuration", CONFIGURATIONS[3:4] if DEVICE == "cpu" else CONFIGURATIONS, ids=str
)
def test_opcheck(called: list[str], configuration: tuple[Any, ...]) -> None:
    arguments = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in
                      tail_arguments(*configuration))  # fmt: skip
    leaves = tuple(
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in arguments
    )
    with ops.use("triton"):
        opcheck(torch.ops.senet.tail.default, leaves)
    assert {"forward", "backward"} <= set(called)


def test_compiled_and_under_autocast(called: list[str]) -> None:
    """One opaque node in the graph, with the numbers of the eager call."""
    case = Case(dtype=torch.bfloat16)
    t = inputs(case)
    with ops.use("triton"), torch.autocast(DEVICE, dtype=torch.bfloat16):
        eager = apply({k: v.clone() for k, v in t.items()}, case)
        torch._dynamo.reset()
        compiled = torch.compile(lambda v: apply(v, case), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled({k: v.clone() for k, v in t.items()}), eager)
    assert called == ["forward", "forward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_follows_a_convolution_in_one_pass(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The optimized network's convolution: bias, gates, shortcut and ReLU, each optional."""
    finished: list[object] = []
    real = triton.finish
    monkeypatch.setattr(triton, "finish", lambda *a: finished.append(a) or real(*a))
    t = inputs(Case(N=2, C=12, spatial=(5, 7), dtype=dtype))
    conv = nn.Conv2d(12, 12, 3, padding=1).to(DEVICE, dtype)
    for relu in (True, False):
        for gates in (None, torch.rand(2, 12, device=DEVICE)):
            for shortcut in (None, t["shortcut"]):
                fused = FusedConv(conv)
                fused.activation = RELU if relu else LINEAR
                with torch.no_grad(), ops.use("triton"):
                    found = fused(t["x"], gates, shortcut)
                    expected = conv.double()(t["x"].double())
                conv.to(dtype)
                if gates is not None:
                    expected = expected * gates[:, :, None, None].double()
                if shortcut is not None:
                    expected = expected + shortcut.double()
                expected = expected.relu() if relu else expected
                # the convolution's output is rounded once more
                assert error(found, expected) < (2e-6 if dtype == torch.float32 else 2**-7)
                assert found.dtype == dtype
    assert len(finished) == 8


def test_optimized_network_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("se_resnet8_cifar", num_classes=3, reduction=4).to(DEVICE).eval()
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    finished: list[object] = []
    real = triton.finish
    monkeypatch.setattr(triton, "finish", lambda *a: finished.append(a) or real(*a))
    optimized = optimize(model, x)
    network = optimized.network
    graph = network.graph_module if DEVICE == "cpu" else network  # not the C++ kernels
    with torch.no_grad():
        with ops.use("triton"):
            found = graph(x)
        with ops.use("reference"):
            assert error(found, model(x)) < 1e-4
    assert len(finished) >= 7


def test_only_the_cpp_kernels_outputs_are_recomputed() -> None:
    t = inputs(Case())
    x = t["x"].requires_grad_()
    with ops.use("triton"):
        norm = (t["weight"], t["bias"], t["running_mean"], t["running_var"])
        y = ops.bn_se_add_relu(x, None, *norm, training=True, momentum=0.1, eps=1e-5)
    assert isinstance(ops.recomputed(y), nullcontext)


def test_what_the_kernels_cannot_take_is_said() -> None:
    t = inputs(Case())
    with ops.use("triton"), pytest.raises(UserError, match=r"(?i)triton.*auto"):
        apply({k: v.to("meta") for k, v in t.items()}, Case())


def test_auto_takes_the_kernels_on_a_gpu_only(called: list[str]) -> None:
    with ops.use("auto"):
        apply(inputs(Case()), Case())
    assert called == (["forward"] if DEVICE == "cuda" else [])
    assert ops.implementations()["triton"].available
