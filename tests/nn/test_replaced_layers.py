"""SE networks whose layers were replaced, that carry hooks, or that other tools look into."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.helpers.marks import separate_passes
from timm.layers import SEModule
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from senet import SqueezeExcitation, create_model, fuse, optimize
from senet.anatomy import excitations
from senet.commands.summary import summarize_block
from senet.errors import UserError
from senet.gates.blocks import PartialExcitation, PartialShape, as_partial
from senet.nn.tails import residual_tail

pytestmark = separate_passes

NORMS_INSIDE = ["se_resnet8_cifar", "se_bn_inception", "vgg16_bn", "senet154", "se_resnet18"]


def network(name: str = "se_resnet8_cifar", **options: Any) -> nn.Module:
    return create_model(name, num_classes=4, **options).eval()


def fused() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), SEModule(8, rd_channels=4))
    model = Foreign(layers)
    assert fuse(model, torch.randn(2, 3, 8, 8)).fused
    return model


class Foreign(nn.Module):
    """A network whose class is not ours."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.se = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.act(self.bn(self.conv(x))))


def blocks(model: nn.Module) -> list[SqueezeExcitation]:
    return [module for module in model.modules() if isinstance(module, SqueezeExcitation)]


class Lora(nn.Module):
    """A layer with a small one beside it, as LoRA puts it in; without a `weight` of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base)
        linear.weight.data += self.up.weight @ self.down.weight
        return linear


class LoraLinear(nn.Linear):
    """The same as a class derived from nn.Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.more = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.more.T

    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features)
        linear.weight.data, linear.bias.data = self.weight + self.more, self.bias
        return linear


@torch.no_grad()
@pytest.mark.parametrize("wrapper", [Lora, LoraLinear])
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize("squeeze", ["avg", "none"])
def test_a_wrapped_layer_in_every_block(wrapper: Any, layer: str, squeeze: str) -> None:
    model = network(squeeze=squeeze)
    merged = copy.deepcopy(model)
    for block, other in zip(blocks(model), blocks(merged), strict=True):
        wrapped = wrapper(getattr(block, layer))
        setattr(block, layer, wrapped)
        setattr(other, layer, wrapped.merged())
        assert summarize_block(block, (8, 8)).rows
    found = excitations(model)
    assert [as_partial(each) for each in found.values()] == [None] * 3
    x = torch.randn(2, 3, 32, 32)
    wanted = merged(x)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    fast = optimize(model, x)
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-5)
    why = dict(fast.report.left)["layer1.0.se"]
    assert why == (f"its {layer} is a {wrapper.__name__}" if squeeze == "avg" else "squeeze='none'")
    torch.testing.assert_close(copy.deepcopy(model).half().float()(x), wanted, rtol=0.02, atol=0.02)


def test_a_wrapped_layer_is_trained() -> None:
    model = network().train().requires_grad_(False)
    for block in blocks(model):
        block.fc1 = Lora(block.fc1)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(block.fc1.up.weight.grad.abs().sum() > 0 for block in blocks(model))


@torch.no_grad()
def test_quantized_layers_in_every_block() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch moves its quantization to another package
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    block = quantized.layer1[0].se
    assert not isinstance(block.fc1, nn.Linear)
    assert as_partial(excitations(quantized)["layer1.0.se"]) is None
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory begins as NaN, not at random
    try:
        assert summarize_block(block, (8, 8)).rows
    finally:
        torch.use_deterministic_algorithms(False)
    x = torch.randn(2, 3, 32, 32)
    wanted, exact = quantized(x), model(x)
    assert 0 < (wanted - exact).abs().max() < 0.1 * exact.abs().max()
    fast = optimize(quantized, x)
    for shape in ((2, 3, 32, 32), (1, 3, 40, 36)):
        y = torch.randn(shape)
        # A rounding apart, a value falls to the next of 256 steps now and then.
        torch.testing.assert_close(fast(y), quantized(y), rtol=0.02, atol=0.02)
    assert "its fc1 is a" in dict(fast.report.left)["layer1.0.se"]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"squeeze": "max"}, {"squeeze": "none"}, {"gate": "tanh"}])
def test_symbolic_traces_take_any_batch_size_and_dtype(options: dict[str, Any]) -> None:
    model = network(**options)
    traced = fx.symbolic_trace(model)
    for shape in ((2, 3, 32, 32), (3, 3, 20, 24)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    torch.testing.assert_close(traced.double()(x), model.double()(x))


@pytest.mark.parametrize(
    "name",
    [
        *("se_resnet8_cifar", "se_resnet18", "se_bn_inception", "se_mobilenet"),
        *("se_shufflenet_g3", "se_vgg16_bn", "se_inception_resnet_v2"),
        "se_shake_even29_2x4x64d_cifar",
    ],
)
def test_every_family_can_be_traced(name: str) -> None:
    with torch.device("meta"):
        model = network(name)
    graph = fx.symbolic_trace(model).graph
    assert any(str(node.target).endswith(".gate") for node in graph.nodes)


@torch.no_grad()
def test_blocks_with_gates_for_some_channels_are_traced_and_optimized() -> None:
    shape = PartialShape(channels=8, hidden=2, kept=3, activation="ReLU", gate="tanh", bias=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), PartialExcitation(shape), nn.Conv2d(8, 4, 1)).eval()
    model[1].kept.copy_(torch.tensor([1, 4, 6]))
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))
    fast = optimize(model, x)
    assert not fast.report.left
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_feature_extractor() -> None:
    model = network()
    wanted: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: wanted.update({name: out}))
        for name, module in model.named_modules()
        if name in ("layer1.0.bn2", "layer1.0.se", "layer1", "layer2.0.se.gate")
    ]
    x = torch.randn(2, 3, 32, 32)
    model(x)
    for handle in handles:
        handle.remove()
    names = {"layer1.0.bn2": "norm", "layer1.0.se.mul": "se", "layer1": "stage"}
    found = create_feature_extractor(model, {**names, "layer2.0.se.gate": "gate"})(x)
    torch.testing.assert_close(found["norm"], wanted["layer1.0.bn2"])
    torch.testing.assert_close(found["se"], wanted["layer1.0.se"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["stage"], wanted["layer1"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["gate"], wanted["layer2.0.se.gate"], rtol=1e-4, atol=1e-5)
    assert (found["norm"] < 0).any()


@pytest.mark.parametrize(
    "make",
    [
        network,
        lambda: network("resnet8_cifar"),
        lambda: SqueezeExcitation(8, 4),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), SqueezeExcitation(8, 4)),
        lambda: optimize(network(), torch.randn(1, 3, 32, 32), measure=False),
        fused,
    ],
    ids=["SE network", "plain", "block", "block in another's network", "optimized", "fused"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_script_names_the_way_out(make: Any) -> None:
    with pytest.raises(UserError, match=r"torch\.jit\.script cannot compile .*torch\.jit\.trace"):
        torch.jit.script(make())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_way_out_is_one() -> None:
    model, x = network(), torch.randn(2, 3, 32, 32)
    traced = torch.jit.trace(model, x)
    other = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NORMS_INSIDE)
def test_what_hooks_keep_stays_as_it_was(name: str, training: bool) -> None:
    """Of every module: a hook may keep what went in and what came out."""
    model = network(name, **({"dropout": 0.0} if name == "vgg16_bn" else {})).train(training)
    kept: list[tuple[str, Tensor, Tensor]] = []

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for tensor in (*inputs, output):
                if isinstance(tensor, Tensor):
                    kept.append((path, tensor.detach(), tensor.detach().clone()))

        return hook

    for path, module in model.named_modules():
        if path:
            module.register_forward_hook(keep(path))
    model(torch.randn(2, 3, max(32, model.min_input_size), max(32, model.min_input_size)))
    assert len(kept) > 20
    assert [path for path, now, then in kept if not torch.equal(now, then)] == []


@pytest.mark.parametrize("name", NORMS_INSIDE)
def test_full_backward_hooks_on_every_module(name: str) -> None:
    model = network(name).train()
    called: set[str] = set()
    paths = [path for path, module in model.named_modules() if path and not list(module.children())]
    for path in paths:
        model.get_submodule(path).register_full_backward_hook(
            lambda _m, _i, _o, path=path: called.add(path)
        )
    side = max(32, model.min_input_size)
    images = torch.randn(2, 3, side, side, requires_grad=True)
    model(images).square().sum().backward()
    assert [path for path in paths if path not in called] == []


@torch.no_grad()
def test_a_replaced_activation_of_vgg_is_used() -> None:
    model = network("vgg16_bn")
    model.features[2] = nn.Tanh()
    x = torch.randn(1, 3, 32, 32)
    first = model.features[3](torch.tanh(model.features[1](model.features[0](x))))
    wanted = model.features[6](torch.relu(model.features[4](first)))
    torch.testing.assert_close(model.forward_stage(1, x), wanted, rtol=1e-4, atol=1e-5)


def test_a_tail_beside_a_hook_gives_the_same_gradients() -> None:
    bn, se = nn.BatchNorm2d(8), SqueezeExcitation(8, 2)
    x, shortcut = torch.randn(2, 3, 8, 5, 5).unbind(1)[0], torch.randn(2, 8, 5, 5)
    gradients = []
    for hook in (False, True):
        mine = copy.deepcopy(bn)
        if hook:
            mine.register_full_backward_hook(lambda *_: None)
        leaf = x.clone().requires_grad_()
        residual_tail(leaf, shortcut, mine, se).square().sum().backward()
        gradients.append((leaf.grad, mine.weight.grad))
    for fused, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, apart, rtol=1e-4, atol=1e-5)
