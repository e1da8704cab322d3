"""Names, options and their errors; and that SE is really there, in the right place."""

import pytest
import torch
from torch import nn

import senet
from senet.errors import UserError
from senet.models import entry, list_models
from senet.models.cost import count_multiply_adds, count_parameters, meta_model

SE_NAMES = [name for name in list_models() if entry(name).se]
PLAIN_NAMES = [name for name in list_models() if not entry(name).se]


def small(name, **options):
    """The network in its shape, narrow input, few classes."""
    torch.manual_seed(0)
    return senet.create_model(name, num_classes=3, **options)


def smallest_image(model, n=2):
    # About twice the smallest size, so that batch norm sees more than one position everywhere;
    # odd and not square, so that a transposed size or a branch of another rounding is seen.
    size = 2 * model.min_input_size
    return torch.randn(n, model.input_size[0], size + 1, size + 3)


def test_every_network_of_the_issue_exists():
    imagenet = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
    imagenet += ["resnext50_32x4d", "resnext101_32x4d", "bn_inception", "inception_v3"]
    imagenet += ["inception_resnet_v2", "vgg16_bn", "mobilenet", "shufflenet_g3"]
    cifar = [f"resnet{depth}_cifar" for depth in (20, 32, 44, 56, 110, 164)]
    cifar += ["wrn16_8_cifar", "shake_shake26_2x96d_cifar", "shake_even29_2x4x64d_cifar"]
    expected = {*imagenet, *cifar, "senet154", "senet154_plain"}
    expected |= {f"se_{name}" for name in (*imagenet, *cifar)}
    assert expected <= set(list_models())
    assert list_models("se_resnext*_32x4d") == [
        "se_resnext101_32x4d",
        "se_resnext26_32x4d",
        "se_resnext50_32x4d",
    ]
    assert {entry(name).twin for name in SE_NAMES} == set(PLAIN_NAMES)


@pytest.mark.parametrize("name", list_models())
def test_forward_backward_and_round_trip(name):
    model = small(name)
    x = smallest_image(model)
    logits = model(x)
    assert logits.shape == (2, 3)
    logits.sum().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None]
    assert not missing
    again = senet.create_model(**_arguments(model.config))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def _arguments(config):
    return {**{k: v for k, v in config.items() if k != "options"}, **config["options"]}


@pytest.mark.parametrize("name", SE_NAMES)
def test_gates_change_the_output(name):
    """SE is wired in, block by block: a changed gate changes the logits."""
    model = small(name).eval()
    x = smallest_image(model, n=1)
    with torch.no_grad():
        before = model(x)
        blocks = [m for m in model.modules() if isinstance(m, senet.SqueezeExcitation)]
        for block in (blocks[0], blocks[-1]):
            bias = block.fc2.bias.clone()
            block.fc2.bias.add_(3 * torch.randn_like(bias))
            assert not torch.allclose(model(x), before)
            block.fc2.bias.copy_(bias)


# Channels of the SE blocks, in order, of networks that are not made of `ResidualBlock`s.
SE_CHANNELS = {
    # the authors' Caffe definition: the concats of 3a-3c, 4a-4e, 5a, 5b
    "bn_inception": [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024],
    # table 1 of 1512.00567
    "inception_v3": [256, 288, 288, 768, 768, 768, 768, 768, 1280, 2048, 2048],
    "inception_resnet_v2": [320] * 10 + [1088] * 20 + [2080] * 10,
    "vgg16_bn": [64, 128, 256, 512, 512],
    "mobilenet": [64, 128, 128, 256, 256] + [512] * 6 + [1024] * 2,
    # Units with stride 2 only add what the pooled input does not bring.
    "shufflenet_g3": [216, *[240] * 3, 240, *[480] * 7, 480, *[960] * 3],
    "shake_shake26_2x96d_cifar": [96] * 4 + [192] * 4 + [384] * 4,
    "shake_even29_2x4x64d_cifar": [256] * 3 + [512] * 3 + [1024] * 3,
}


@pytest.mark.parametrize("name", SE_NAMES)
def test_se_adds_equation_5_and_biases(name):
    """Δ parameters = Σ 2·C·floor(C/16) + biases, one block at each place."""
    model, plain = meta_model(name), meta_model(entry(name).twin)
    blocks = [m.channels for m in model.modules() if isinstance(m, senet.SqueezeExcitation)]
    expected = SE_CHANNELS.get(entry(name).twin)
    if expected is None:
        residual = [m for m in plain.modules() if hasattr(m, "se_at")]
        last = [getattr(m, "conv3", None) or m.conv2 for m in residual]
        expected = [conv.out_channels for conv in last]
    assert blocks == expected
    added = sum(2 * c * max(1, c // 16) + c + max(1, c // 16) for c in expected)
    assert count_parameters(model) - count_parameters(plain) == added


@pytest.mark.parametrize("integration", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize(
    "name",
    ["se_resnet18", "se_resnet50", "se_resnext50_32x4d", "se_resnet164_cifar", "se_wrn16_8_cifar"],
)
def test_integrations_stand_where_figure_5_puts_them(name, integration):
    """Each variant is the plain network with SE applied by hand at its place."""
    model = small(name, integration=integration, gate="tanh").eval()
    first, second = model.layer2[:2]
    assert isinstance(first.downsample, nn.Module)  # a projection
    assert second.downsample is None  # the identity
    for block in (first, second):
        assert_figure_5(block, integration)


def assert_figure_5(block, integration):
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    se, relu, preactivated = block.se, torch.relu, hasattr(block, "branch")

    def branch(u):
        if preactivated:
            u = block.conv1(u)
            if not hasattr(block, "conv3"):
                u = block.bn2(u)
                return block.conv2(relu(se(u) if integration == "3x3" else u))
            u = block.conv2(relu(block.bn2(u)))
            u = block.bn3(u)
            return block.conv3(relu(se(u) if integration == "3x3" else u))
        u = block.bn1(block.conv1(u))
        if hasattr(block, "conv3"):
            u = block.bn2(block.conv2(relu(u)))
            u = se(u) if integration == "3x3" else u
            return block.bn3(block.conv3(relu(u)))
        u = se(u) if integration == "3x3" else u
        return block.bn2(block.conv2(relu(u)))

    start = relu(block.bn1(x)) if preactivated else x
    shortcut = x if block.downsample is None else block.downsample(start)
    shortcut = se(shortcut) if integration == "identity" else shortcut
    out = branch(se(start) if integration == "pre" else start)
    out = se(out) if integration == "standard" else out
    out = shortcut + out if preactivated else relu(shortcut + out)
    out = se(out) if integration == "post" else out
    torch.testing.assert_close(block(x), out)


@pytest.mark.parametrize("stages", [(2,), (3,), (4,), (5,), (2, 5), (3, 4, 5), [5, 2]])
def test_stages_that_get_se(stages):
    model = meta_model("se_resnet50", stages=stages)
    with_se = {
        int(name.split(".")[0].removeprefix("layer")) + 1
        for name, module in model.named_modules()
        if isinstance(module, senet.SqueezeExcitation)
    }
    assert with_se == set(stages)


def test_options_reach_the_blocks():
    model = small("se_resnet20_cifar", reduction=4, squeeze="max", gate="identity_sigmoid")
    block = model.layer3[0].se
    assert (block.hidden, block.squeeze.method, block.gate_name) == (16, "max", "identity_sigmoid")
    assert torch.equal(block.fc2.weight, torch.zeros(64, 16))


def test_caffe_variant_has_the_released_structure():
    """Strides and pooling of the authors' Caffe definition."""
    model = meta_model("se_resnet50", variant="caffe")
    assert (model.maxpool.padding, model.maxpool.ceil_mode) == (0, True)
    assert (model.layer2[0].conv1.stride, model.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    resnext = meta_model("se_resnext50_32x4d", variant="caffe")
    assert (resnext.layer2[0].conv1.stride, resnext.layer2[0].conv2.stride) == ((1, 1), (2, 2))
    largest = meta_model("senet154", variant="caffe")
    widths = [
        (stage[0].conv1.out_channels, stage[0].conv2.out_channels)
        for stage in (largest.layer1, largest.layer2, largest.layer3, largest.layer4)
    ]
    assert widths == [(128, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert largest.layer1[0].downsample[0].kernel_size == (1, 1)
    assert largest.layer2[0].downsample[0].kernel_size == (3, 3)
    assert largest.dropout.p == 0.2


FAMILIES = [
    "se_resnet50",
    "se_resnet20_cifar",
    "se_wrn16_8_cifar",
    "se_bn_inception",
    "se_inception_v3",
    "se_inception_resnet_v2",
    "se_vgg16_bn",
    "se_mobilenet",
    "se_shufflenet_g3",
    "se_shake_shake26_2x96d_cifar",
    "se_shake_even29_2x4x64d_cifar",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_of_each_network_are_numbered_by_stride(name):
    """One SE option per stage; channels and strides are what the maps have."""
    model = meta_model(name).eval()
    first = 2 if name.endswith("_cifar") else 0
    x = model.forward_stem(torch.empty(1, *model.input_size, device="meta"))
    for number, stage in model.stages.items():
        x = model.forward_stage(number, x)
        assert x.shape[1] == stage.channels
        assert stage.stride == 2 ** (number - first)
        assert x.shape[2] == pytest.approx(model.input_size[1] / stage.stride, abs=3)
        alone = meta_model(name, stages=(number,))
        with_se = {
            key.split(".se")[0]
            for key, module in alone.named_modules()
            if isinstance(module, senet.SqueezeExcitation)
        }
        assert with_se
        assert all(
            any(key == child or key.startswith(f"{child}.") for child in stage.children)
            for key in with_se
        )
    assert model.num_features == x.shape[1]


def test_each_family_has_its_network():
    tested = {entry(name).builder.__module__ for name in FAMILIES}
    assert tested == {entry(name).builder.__module__ for name in list_models()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("in_channels", [1, 4])
def test_without_classes_the_network_returns_pooled_features(name, in_channels):
    model = senet.create_model(name, num_classes=0, in_channels=in_channels).eval()
    x = smallest_image(model)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        torch.testing.assert_close(model(x), features.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_construction_is_a_function_of_the_seed():
    first, second = small("se_resnet20_cifar"), small("se_resnet20_cifar")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_convolutions_start_as_he_et_al_propose():
    weight = small("se_resnet50").layer3[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last_bf16_and_export(name):
    model = small(name).eval()
    x = smallest_image(model)
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1 * scale)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)


# The others take minutes and compile the same blocks.
COMPILED = ["se_resnet20_cifar", "se_shake_even29_2x4x64d_cifar"]


@pytest.mark.parametrize("name", COMPILED)
def test_compile_in_one_graph(name):
    model = small(name).eval()
    x = smallest_image(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("se_resnet5O", {}, "unknown model 'se_resnet5O'; did you mean 'se_resnet50'?"),
        ("efficientformer", {}, "unknown model .*"),
        ("resnet50", {"reduction": 8}, "resnet50 has no SE .* use se_resnet50"),
        ("senet154_plain", {"gate": "tanh"}, "use senet154"),
        ("se_resnet50", {"ratio": 8}, "no option 'ratio'; its options: reduction, squeeze"),
        ("resnet20_cifar", {"variant": "caffe"}, "no option 'variant'; its options: none"),
        ("se_resnet50", {"reduction": 0}, "reduction must be a positive number, got 0"),
        ("se_resnet50", {"reduction": "x"}, "reduction must be a positive number, got 'x'"),
        ("se_resnet50", {"squeeze": "sum"}, "squeeze must be one of avg, max, none, got 'sum'"),
        ("se_resnet50", {"gate": "softmax"}, "gate must be one of .* got 'softmax'"),
        ("se_resnet50", {"integration": "after"}, "integration must be one of standard, .*"),
        ("se_resnet50", {"stages": (1, 2)}, r"stages must be .* got \(1, 2\)"),
        ("se_resnet50", {"stages": ()}, "stages must be"),
        ("se_resnet50", {"stages": (2, 2)}, "stages must be"),
        ("se_resnet20_cifar", {"stages": (5,)}, r"out of \(2, 3, 4\), got \(5,\)"),
        ("se_resnet50", {"variant": "tf"}, "variant must be one of torch, caffe, cadene, got 'tf'"),
        ("senet154", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("se_resnet50", {"variant": "cadene"}, 'variant "cadene" is for basic blocks with SE'),
        ("resnet18", {"variant": "cadene"}, 'variant "cadene" is for basic blocks with SE'),
        ("se_resnet50", {"bias": "no"}, "bias must be true or false, got 'no'"),
        ("se_resnet50", {"divisor": 0}, "divisor must be a positive whole number, got 0"),
        ("se_vgg16_bn", {"integration": "pre"}, "integration must be standard in this network"),
        ("se_bn_inception", {"stages": (2,)}, r"out of \(3, 4, 5\), got \(2,\)"),
        ("mobilenet", {"width": 0}, "width must be a positive number, got 0"),
        ("inception_v3", {"aux": True, "num_classes": 0}, "aux needs classes, got num_classes=0"),
        ("se_resnet50", {"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ("se_resnet50", {"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_when_constructed(name, options, message):
    with pytest.raises(UserError, match=message):
        senet.create_model(name, **options)


def test_multiply_adds_leave_the_model_alone():
    model = small("se_resnet8_cifar")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert count_multiply_adds(model, (3, 32, 32)) > 0
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match="input_size"):
        count_multiply_adds(nn.Linear(3, 3))
    for wrong in (224, (3, 0, 32), (3, 32.0, 32), ()):
        with pytest.raises(ValueError, match=r"such as \(3, 224, 224\), got"):
            count_multiply_adds(model, wrong)
