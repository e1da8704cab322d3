"""The SE block against the equations of the paper, in every form it is offered."""

import pickle

import pytest
import torch
from tests.helpers.marks import separate_passes
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import senet
from senet.nn.block import GATES, SQUEEZES, hidden_width
from senet.nn.hooks import without_remark
from senet.nn.tails import residual_tail


def equations(se: senet.SqueezeExcitation, x: Tensor) -> Tensor:
    """Equations 2 to 4 written out image by image, channel by channel."""
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        z = torch.stack([u.mean() if se.squeeze.method == "avg" else u.max() for u in x[n]])
        hidden = se.activation(se.fc1.weight @ z + (se.fc1.bias if se.fc1.bias is not None else 0))
        t = se.fc2.weight @ hidden + (se.fc2.bias if se.fc2.bias is not None else 0)
        gates = {
            "sigmoid": lambda t: 1 / (1 + torch.exp(-t)),
            "tanh": torch.tanh,
            "relu": lambda t: t.clamp(min=0),
            "hard_sigmoid": lambda t: (t / 6 + 0.5).clamp(0, 1),
            "identity_sigmoid": lambda t: 2 / (1 + torch.exp(-t)),
        }[se.gate_name](t)
        for c in range(x.shape[1]):
            out[n, c] = gates[c] * x[n, c]
    return out


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)


@separate_passes
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", ["avg", "max"])
@pytest.mark.parametrize("bias", [True, False])
def test_follows_the_equations(gate, squeeze, bias):
    se = senet.SqueezeExcitation(12, 5, squeeze=squeeze, gate=gate, bias=bias, dtype=torch.float64)
    randomise(se)
    x = torch.randn(3, 12, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(se(x), equations(se, x), rtol=1e-12, atol=1e-12)


@separate_passes
@pytest.mark.parametrize(("dims", "size"), [(1, (9,)), (2, (3, 4)), (3, (2, 3, 4))])
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_any_number_of_dimensions(dims, size, squeeze):
    se = senet.SqueezeExcitation(6, 2, dims=dims, squeeze=squeeze)
    x = torch.randn(2, 6, *size)
    assert se(x).shape == x.shape
    flat = senet.SqueezeExcitation(6, 2, dims=1, squeeze=squeeze)
    flat.load_state_dict(se.state_dict())
    torch.testing.assert_close(se(x).flatten(2), flat(x.flatten(2)))


@separate_passes
def test_no_squeeze_is_two_pointwise_convolutions():
    se = senet.SqueezeExcitation(8, 2, squeeze="none")
    x = torch.randn(2, 8, 5, 6)
    hidden = torch.relu(nn.functional.conv2d(x, se.fc1.weight[:, :, None, None], se.fc1.bias))
    gates = torch.sigmoid(
        nn.functional.conv2d(hidden, se.fc2.weight[:, :, None, None], se.fc2.bias)
    )
    torch.testing.assert_close(se(x), gates * x)


@pytest.mark.parametrize(
    ("channels", "reduction", "hidden"),
    [(64, 3, 21), (576, 16, 36), (1056, 16, 66), (64, 16, 4), (8, 16, 1), (1, 16, 1), (10, 2.5, 4)],
)
def test_hidden_width_is_floor_and_never_zero(channels, reduction, hidden):
    assert hidden_width(channels, reduction) == hidden
    assert senet.SqueezeExcitation(channels, reduction).fc1.weight.shape == (hidden, channels)


@separate_passes
def test_parameters_of_the_seed_block():
    se = senet.SqueezeExcitation(64, 3, squeeze="max")
    counts = [sum(p.numel() for p in layer.parameters()) for layer in (se.fc1, se.fc2)]
    assert counts == [1365, 1408]
    shapes = {}
    for name in ("squeeze", "fc1", "activation", "fc2", "gate"):
        se.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: shapes.__setitem__(name, tuple(output.shape))
        )
    se(torch.randn(1, 64, 128, 128))
    assert shapes == {
        "squeeze": (1, 64, 1, 1),
        "fc1": (1, 21),
        "activation": (1, 21),
        "fc2": (1, 64),
        "gate": (1, 64),
    }


def test_added_parameters_are_equation_5():
    """(2/r)·C² without biases."""
    assert sum(p.numel() for p in senet.SqueezeExcitation(256, 16, bias=False).parameters()) == (
        2 * 256**2 // 16
    )


def test_explicit_hidden_width_and_activation():
    se = senet.SqueezeExcitation(16, hidden=5, activation=nn.SiLU)
    assert se.fc1.out_features == 5
    assert isinstance(se.activation, nn.SiLU)


@separate_passes
def test_a_module_as_gate():
    se = senet.SqueezeExcitation(4, 2, gate=nn.Softplus())
    x = torch.randn(2, 4, 3, 3)
    z = x.mean((2, 3))
    gates = nn.functional.softplus(se.fc2(torch.relu(se.fc1(z))))
    torch.testing.assert_close(se(x), x * gates[:, :, None, None])


@separate_passes
@pytest.mark.parametrize("gate", [nn.Hardsigmoid(), nn.Tanh(), nn.Softplus()], ids=repr)
def test_a_gate_put_in_the_place_of_another(gate):
    se = senet.SqueezeExcitation(8, 4)
    se.gate = gate
    x = 5 * torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(se(x), x * se.excite(x))
    name = {nn.Hardsigmoid: "hard_sigmoid", nn.Tanh: "tanh"}.get(type(gate), "Softplus")
    assert se.gate_name == name
    assert pickle.loads(pickle.dumps(se)).gate_name == name


@separate_passes
@pytest.mark.parametrize("name", ["se_resnet8_cifar", "vgg16_bn"])
def test_global_hooks_see_every_module(name):
    model = senet.create_model(name, num_classes=0).eval()
    seen = set()
    with register_module_forward_hook(lambda module, *_: seen.add(module)):
        model(torch.randn(1, 3, 32, 32))
    wanted = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, senet.SqueezeExcitation)
    layers = {m for m in model.modules() if isinstance(m, wanted)}
    assert layers <= seen


def test_the_remark_left_out_for_hooks_of_ours_is_made_of_others() -> None:
    se, x = senet.SqueezeExcitation(8, 4), torch.randn(2, 8, 4, 4)
    with se.register_forward_hook(lambda *_: None):
        with without_remark():
            se(x)
        with pytest.warns(UserWarning, match=r"hooks \(SqueezeExcitation\) in separate passes"):
            se(x)
        se(x)  # said once: a second warning would be an error


def test_identity_gate_starts_as_the_identity_with_a_live_gradient():
    se = senet.SqueezeExcitation(8, 2, gate="identity_sigmoid")
    x = torch.randn(2, 8, 4, 4)
    out = se(x)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert se.fc2.weight.grad is not None
    assert se.fc2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_maps_are_squeezed_in_float32(dtype):
    """The sum over 112×112 float16 values overflows (65504), and bfloat16 sums stall at 256."""
    se = senet.SqueezeExcitation(4, 2)
    x = (torch.rand(2, 4, 112, 112) + 100).to(dtype)
    z = se.squeeze(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, x.double().mean((2, 3), keepdim=True).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(se(x).float(), se(x.float()), rtol=2**-8, atol=0)
    assert se(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_low_precision(dtype):
    se = senet.SqueezeExcitation(4, 2, dtype=dtype)
    x = torch.full((1, 4, 112, 112), 300.0, dtype=dtype)
    assert se(x).dtype == dtype
    assert se(x).isfinite().all()


@separate_passes
def test_autocast_leaves_squeeze_and_excitation_in_float32():
    se = senet.SqueezeExcitation(16, 2)
    seen = []
    se.gate.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    x = torch.randn(2, 16, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = se(x)
    assert seen == [torch.float32]
    assert out.dtype == torch.bfloat16


def test_channels_last_is_kept():
    se = senet.SqueezeExcitation(8, 2)
    x = torch.randn(2, 8, 5, 5)
    out = se(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, se(x))


@pytest.mark.parametrize("squeeze", ["avg", "max"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_mask_squeezes_what_is_not_padding(squeeze, dims):
    se = senet.SqueezeExcitation(6, 2, squeeze=squeeze, dims=dims)
    size = (7, 5, 4)[:dims]
    x = torch.randn(2, 6, *size) - 5
    mask = torch.ones(2, 1, *size, dtype=torch.bool)
    mask[0, :, 4:] = False
    x = torch.where(mask, x, torch.nan)  # padding may hold anything
    gates = se.excite(x, mask)
    alone = se.excite(x[:1, :, :4])
    torch.testing.assert_close(gates[:1], alone)
    torch.testing.assert_close(gates[1:], se.excite(x[1:]))
    assert torch.equal(se.excite(x, mask), gates)


@pytest.mark.parametrize("squeeze", ["avg", "max"])
def test_an_image_that_is_all_padding_squeezes_to_zero(squeeze):
    se = senet.SqueezeExcitation(4, 2, squeeze=squeeze)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    assert torch.equal(se.squeeze(torch.randn(1, 4, 3, 3), mask), torch.zeros(1, 4, 1, 1))


@separate_passes
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_compile_export_and_trace(squeeze):
    se = senet.SqueezeExcitation(8, 2, squeeze=squeeze).eval()
    x = torch.randn(2, 8, 6, 6)
    expected = se(x)
    compiled = torch.compile(se, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.compile(se, fullgraph=True, backend="aot_eager")(x).dtype == torch.float32
    exported = torch.export.export(se, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    with torch.no_grad():
        traced = torch.jit.trace(se, x)
        larger = torch.randn(3, 8, 9, 4)
        torch.testing.assert_close(traced(larger), se(larger))


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch_and_single_position(batch):
    se = senet.SqueezeExcitation(4, 2)
    assert se(torch.randn(batch, 4, 1, 1)).shape == (batch, 4, 1, 1)


def test_residual_tail_is_bn_se_add_relu():
    bn, shortcut_bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    se = senet.SqueezeExcitation(8, 2)
    x, shortcut = torch.randn(2, 2, 8, 4, 4)
    out = residual_tail(x, shortcut, bn, se, shortcut_bn)
    again, shortcut_again = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    torch.testing.assert_close(out, torch.relu(se(again(x)) + shortcut_again(shortcut)))
    torch.testing.assert_close(bn.running_var, again.running_var)
    torch.testing.assert_close(residual_tail(x, None, bn), torch.relu(again(x)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"channels": 8, "reduction": 0}, "reduction must be positive, got 0"),
        ({"channels": 8, "reduction": -4}, "reduction must be positive, got -4"),
        ({"channels": 8, "reduction": None}, "reduction must be positive, got None"),
        ({"channels": 8, "reduction": float("nan")}, "reduction must be positive, got nan"),
        ({"channels": 8, "gate": ["tanh"]}, r"gate must be one of sigmoid, .* got \['tanh'\]"),
        ({"channels": 8, "hidden": 0}, "hidden must be at least 1, got 0"),
        ({"channels": 8, "squeeze": "mean"}, "squeeze must be one of avg, max, none, got 'mean'"),
        ({"channels": 8, "gate": "softmax"}, "gate must be one of sigmoid, .* got 'softmax'"),
        ({"channels": 8, "dims": 4}, "dims must be 1, 2 or 3, got 4"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        senet.SqueezeExcitation(**arguments)


@pytest.mark.parametrize(
    ("x", "mask", "squeeze", "message"),
    [
        ((2, 5, 3, 3), None, "avg", r"x must have shape \(N, 8, H, W\), got \(2, 5, 3, 3\)"),
        ((2, 8, 3), None, "avg", r"x must have shape \(N, 8, H, W\), got \(2, 8, 3\)"),
        ((2, 8, 3, 3), (2, 8, 3, 3), "avg", r"mask must have shape \(2, 1, 3, 3\)"),
        ((2, 8, 3, 3), (2, 1, 3, 3), "none", "mask has no effect"),
    ],
)
def test_bad_input_is_named(x, mask, squeeze, message):
    se = senet.SqueezeExcitation(8, 2, squeeze=squeeze)
    with pytest.raises(ValueError, match=message):
        se(torch.randn(x), None if mask is None else torch.ones(mask, dtype=torch.bool))
