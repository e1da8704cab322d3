"""senet.optimize on whole networks and on models it does not know."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.marks import separate_passes
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from senet.errors import SenetError, UserError
from senet.inference import OptimizedModel, optimize, rounding
from senet.inference.modules import SqueezeGate
from senet.inference.part import OptimizedPart
from senet.models import list_models
from senet.networks.create import create_model
from senet.nn.block import SqueezeExcitation

# Relative to the largest output. What float32 rounding amounts to in these networks.
TOLERANCE = 1e-5

# Deeper variants of the same code are left out, and most plain networks, whose layers all occur.
DEEPER = ("plain", "101", "152", "32_cifar", "44_cifar", "56_cifar", "110_cifar", "34")
PLAIN = ("resnet18", "resnet50", "resnet164_cifar", "bn_inception", "mobilenet", "shufflenet_g3")
NETWORKS = [
    name
    for name in list_models()
    if not any(part in name for part in DEEPER)
    and (name.startswith(("se_", "senet154")) or name in PLAIN)
]

# 10 s each, of parts that smaller ones have too.
LARGE = ("senet154", "se_shake_even29_2x4x64d_cifar")


@torch.no_grad()
def trained(name: str, size: int | None = None, **options: object) -> tuple[nn.Module, Tensor]:
    """A network whose batch norms have seen images, as after training, and images."""
    model = create_model(name, num_classes=10, **options)
    side = max(model.min_input_size, 96 if size is None else size)
    if size is None and model.input_size[1] <= 32:
        side = 32
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in batch_norms:
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, 0, 0.1)
        bn.momentum = 1.0
    model.train()(torch.randn(8, model.input_size[0], side, side))
    return model.eval(), torch.randn(3, model.input_size[0], side, side)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def allowed(model: nn.Module, x: Tensor) -> float:
    """How far another order of summation may be from eager.

    Untrained deep networks amplify rounding: eager itself is up to 7e-4 away from float64 (noise
    of 1e-7 on the images does as much). Six times eager's own error there, because Winograd's
    F(4×4, 3×3) rounds two to four times as much as a direct convolution; else `TOLERANCE`.
    """
    exact = copy.deepcopy(model).double()(x.double())
    return max(TOLERANCE, 6 * difference(model(x), exact))


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.soak] * (name in LARGE)) for name in NETWORKS],
)
def test_every_network_gives_the_same(name: str) -> None:
    model, x = trained(name)
    limit, wanted = allowed(model, x), model(x)
    optimized = optimize(model, x)
    assert not optimized.report.left
    assert difference(optimized(x), wanted) <= limit
    assert difference(optimized.network.graph_module(x), wanted) <= limit


class Cancels(nn.Module):
    """(x + large) - large: the larger, the more of x is lost."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.tensor(large))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.large) - self.large


@torch.no_grad()
def test_rounding_is_allowed_for_and_nothing_else() -> None:
    x = torch.randn(2, 3, 4, 4)
    for large, least, most in [(1.0, 1e-4, 1e-4), (1e5, 1e-3, 1e-1), (math.nan, 1e-4, 1e-4)]:
        model = Cancels(large)
        assert least <= rounding.allowed(model, x, model(x), 1e-4) <= most
    assert rounding.difference(x, x) == 0
    assert rounding.difference([x, x + 1], [x, x]) > 0.1
    assert rounding.difference(x / 0, x) == math.inf


def test_results_of_other_kinds_differ() -> None:
    """Whole numbers differ where they are no whole numbers any more: rounding may change them."""
    x, y = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    others = [x[:1], x.double(), [x], (x,), {"x": x}, None]
    assert all(rounding.difference(other, x) == math.inf for other in others)
    for found, wanted in [((x, y), [x, y]), ([x], [x, x]), ({"x": x}, {"y": x}), (y > 0, y)]:
        assert rounding.difference(found, wanted) == math.inf
    assert rounding.difference({"x": (x, [y + 1])}, {"x": (x, [y])}) == 0


@torch.no_grad()
@pytest.mark.parametrize("integration", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("name", ["se_resnet18", "se_resnet50"])
def test_every_place_of_se(name: str, integration: str) -> None:
    model, x = trained(name, size=64, integration=integration)
    assert difference(optimize(model, x)(x), model(x)) <= allowed(model, x)


@separate_passes
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"squeeze": "max"},
        {"squeeze": "none"},
        {"gate": "tanh"},
        {"gate": "relu"},
        {"gate": "hard_sigmoid"},
        {"gate": "identity_sigmoid"},
        {"stages": (3,)},
    ],
    ids=str,
)
def test_every_kind_of_se(options: dict[str, object]) -> None:
    model, x = trained("se_resnet8_cifar", reduction=4, **options)
    assert difference(optimize(model, x)(x), model(x)) <= TOLERANCE


def test_the_squeeze_stands_before_the_last_convolution_of_each_block() -> None:
    model, x = trained("se_resnet50", size=64)
    optimized = optimize(model, x)
    gates = [m for m in optimized.modules() if isinstance(m, SqueezeGate)]
    blocks = [m for m in model.modules() if isinstance(m, SqueezeExcitation)]
    assert len(gates) == len(blocks) == 16
    # A quarter of the channels: the inputs of the last convolution.
    assert all(4 * g.weight1.shape[1] == b.channels for g, b in zip(gates, blocks, strict=True))
    squeezed = [name for name, what in optimized.report.fused if "squeeze of" in what]
    assert squeezed[0] == "layer1.0.conv3"
    assert "layer1.0.conv3: addition in the same pass" in str(optimized.report)


@torch.no_grad()
def test_any_batch_and_size_and_memory_format() -> None:
    model, x = trained("se_resnet8_cifar")
    optimized = optimize(model, x)
    for shape in [(1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 17, 41), (1, 3, 64, 64), (7, 3, 8, 8)]:
        x = torch.randn(shape)
        assert difference(optimized(x), model(x)) <= TOLERANCE
    wanted = optimized(x)
    assert torch.equal(optimized(x.contiguous(memory_format=torch.channels_last)), wanted)
    wide = torch.randn(7, 6, 8, 16)
    view = wide[:, ::2, :, ::2]
    assert torch.equal(optimized(view), optimized(view.contiguous()))
    assert optimized(x[:0]).shape == (0, 10)


@torch.no_grad()
def test_results_are_not_overwritten_by_the_next_run() -> None:
    model, x = trained("se_resnet8_cifar")
    optimized = optimize(model, x)
    first = optimized(x)
    kept = first.clone()
    optimized(torch.randn_like(x))
    assert torch.equal(first, kept)


def test_the_original_stays_as_it_was() -> None:
    model, x = trained("se_resnet8_cifar")
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimized = optimize(model, x)
    assert model.training
    assert not optimized.training
    assert all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        wanted = optimized(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(optimized(x), wanted)


@torch.no_grad()
def test_pickle_copy_and_new_weights() -> None:
    model, x = trained("se_resnet8_cifar")
    optimized = optimize(model, x)
    wanted = optimized(x)
    for other in (pickle.loads(pickle.dumps(optimized)), copy.deepcopy(optimized)):
        assert isinstance(other, OptimizedModel)
        assert torch.equal(other(x), wanted)
        assert other.report == optimized.report
    assert optimized.config == model.config
    changed = optimize(trained("se_resnet8_cifar")[0], x)
    optimized.load_state_dict(changed.state_dict())
    assert torch.equal(optimized(x), changed(x))


@torch.no_grad()
def test_other_types_run_in_pytorch() -> None:
    model, x = trained("se_resnet8_cifar")
    optimized = optimize(model, x)
    double = copy.deepcopy(optimized).double()
    assert difference(double(x.double()), copy.deepcopy(model).double()(x.double())) < 1e-6
    half = copy.deepcopy(optimized).bfloat16()
    assert difference(half(x.bfloat16()).float(), model(x)) < 0.1


def test_gradients_reach_the_images() -> None:
    model, x = trained("se_resnet8_cifar")
    optimized = optimize(model, x)
    wanted, found = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(wanted).square().sum().backward()
    optimized(found).square().sum().backward()
    assert difference(found.grad, wanted.grad) < 1e-4


@torch.no_grad()
def test_export_with_any_batch() -> None:
    model, x = trained("se_resnet8_cifar")
    optimized = optimize(model, x)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(optimized, (x,), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("senet" in target or "batch_norm" in target for target in targets)
    other = torch.randn(5, 3, 32, 32)
    assert difference(program.module()(other), model(other)) <= TOLERANCE


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    model, x = trained("se_resnet8_cifar")
    compiled = torch.compile(optimize(model, x), backend="eager", fullgraph=True)
    assert difference(compiled(x), model(x)) <= TOLERANCE


class Untraceable(nn.Module):
    """Control flow that depends on numbers, around parts that can be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Sequential(conv, nn.BatchNorm2d(16), SqueezeExcitation(16))
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.last(self.first(x))


@torch.no_grad()
def test_what_cannot_be_traced_is_left_alone() -> None:
    model, x = Untraceable().eval(), torch.randn(2, 3, 12, 12)
    optimized = optimize(model, x)
    assert difference(optimized(x), model(x)) <= TOLERANCE
    ((name, why),) = optimized.report.left
    assert name == "Untraceable"
    assert "fx" in why
    assert isinstance(optimized.network.first, OptimizedPart)
    assert ("first.0", "batch norm 1 folded into the convolution") in optimized.report.fused


class IntoAPart(nn.Module):
    """A write into some channels of a map that is read as a whole afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x[:, :3].mul_(2.0)
        return self.last(x)


@torch.no_grad()
def test_what_writes_into_a_part_of_a_map_is_left_alone() -> None:
    model, x = IntoAPart().eval(), torch.randn(2, 3, 12, 12)
    optimized = optimize(model, x)
    assert difference(optimized(x), model(x)) <= TOLERANCE
    assert "mul_ writes into what is read later" in str(optimized.report)


class Pyramid(nn.Module):
    """A module that takes a list of maps, and views of maps that PyTorch would have contiguous."""

    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(12, 6, 1)

        def forward(self, maps: list[Tensor]) -> Tensor:
            size = (maps[0].shape[2], maps[0].shape[3])
            if not isinstance(size[0], int):
                raise TypeError("cannot be traced")
            return self.conv(torch.cat([maps[0], F.interpolate(maps[1], size)], 1))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.join, self.last = self.Join(), nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).relu()
        y = self.last(self.join([a, self.second(a).relu()]))
        seen = y.view(y.size(0), 2, 3, -1).softmax(-1)
        return seen.flatten(1) + y.view_as(y).view(y.size(0), -1)


@torch.no_grad()
def test_lists_of_maps_and_views() -> None:
    model, x = Pyramid().eval(), torch.randn(2, 3, 12, 10)
    fast = optimize(model, x, measure=False)
    for images in (x, torch.randn(1, 3, 16, 16)):
        assert difference(fast(images), model(images)) <= 1e-5


@torch.no_grad()
def test_a_foreign_model() -> None:
    import timm

    model = timm.create_model("seresnet18", num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    optimized = optimize(model, x)
    assert difference(optimized(x), model(x)) <= TOLERANCE
    assert any("batch norm" in what for _, what in optimized.report.fused)


@torch.no_grad()
def test_bad_input() -> None:
    model, x = trained("se_resnet8_cifar")
    with pytest.raises(TypeError, match=r"example_input must be a tensor .* got list"):
        optimize(model, [1, 2])
    model.fc.weight.fill_(float("nan"))
    with pytest.raises(SenetError, match="non-finite"):
        optimize(model, x)


class Doubled(nn.Linear):
    """A linear layer that computes something else than one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Squared(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.square()


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Linear, Doubled])
def test_parametrized_layers_and_classes_of_their_own(layer: type[nn.Linear]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer(8, 4))
    for each in (model[0], model[3]):
        parametrize.register_parametrization(each, "weight", Squared())
    x = torch.randn(2, 3, 9, 9)
    fast = optimize(model.eval(), x)
    assert difference(fast(x), model(x)) <= TOLERANCE
    for each in (model, fast):
        (name,) = (n for n, p in each.named_parameters() if n.endswith("original") and p.ndim == 2)
        each.get_parameter(name).mul_(2)
    assert difference(fast(x), model(x)) <= TOLERANCE


class Named(nn.Module):
    """Layers and tensors under names that describe other networks."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = nn.Conv2d(3, 4, 1)
        self.config = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("num_features", torch.randn(4, 1, 1))
        self.input_size = (3, 9, 9)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.preprocessing(pixel_values) * self.config + self.num_features


@torch.no_grad()
def test_layers_under_the_names_of_descriptions_are_layers() -> None:
    model, x = Named().eval(), torch.randn(2, 3, 9, 9)
    fast = optimize(model, x, measure=False)
    assert difference(fast(x), model(x)) <= TOLERANCE
    assert fast.input_size == (3, 9, 9)
    assert not any(hasattr(fast, name) for name in ("preprocessing", "config", "num_features"))


@torch.no_grad()
def test_images_may_be_named_as_the_original_names_them() -> None:
    model, x = Named().eval(), torch.randn(2, 3, 9, 9)
    fast = optimize(model, x, measure=False)
    again = optimize(fast, x, measure=False)
    for each in (fast, again, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(each(pixel_values=x), fast(x))
    within = torch.fx.symbolic_trace(fast)
    assert torch.equal(within(x), fast(x))
    with pytest.raises(TypeError, match=r"\(pixel_values\), got an unexpected .*'mask'"):
        fast(x, mask=x)
    with pytest.raises(TypeError, match=r"\(pixel_values\), got 2 arguments"):
        fast(x, pixel_values=x)
    with pytest.raises(TypeError, match="missing"):
        fast()


class Dropping(Untraceable):
    """What only evaluation mode keeps from changing, around what cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(super().forward(x)))


@torch.no_grad()
def test_stays_in_evaluation_mode() -> None:
    model, x = Dropping().eval(), torch.randn(2, 3, 12, 12)
    fast = optimize(model, x, measure=False)
    assert isinstance(fast.network.drop, nn.Dropout)
    state = copy.deepcopy(fast.state_dict())
    outer = nn.Sequential(fast)
    for trained in (fast.train(), outer.train()[0]):
        assert trained is fast
        assert not any(module.training for module in fast.modules())
        assert difference(fast(x), model(x)) <= TOLERANCE
    assert outer.training
    assert all(torch.equal(state[key], value) for key, value in fast.state_dict().items())


@torch.no_grad()
def test_what_cannot_be_copied_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 9, 9)
    with torch.enable_grad():
        prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(UserError, match=r"0 \(Conv2d\) holds weight .*prune\.remove"):
        optimize(model, x)
