"""SE blocks are found in whatever code they are written, and nothing else is taken for one."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from foreign_blocks import (
    Activation,
    AdditiveAttention,
    AttentionOverPositions,
    Body,
    ChannelsLastSE,
    ConditionalWeights,
    CoordinateAttention,
    DynamicConvolution,
    FirstPosition,
    HFEfficientNetSE,
    HFRegNetSE,
    InATuple,
    InlinedMBConv,
    InstanceNormScale,
    LayerNormScale,
    Lc0SE,
    MonaiChannelSE,
    OldHardSE,
    RepVGGSE,
    ResidualScale,
    ResponseNorm,
    ScSE,
    SelectiveKernel,
    SpeechBrainSE,
    StdSE,
    TwoMaps,
    WeSpeakerSE,
)
from tests.helpers.marks import separate_passes
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, GlobalContext, SEModule
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

import senet
from senet.anatomy import anatomy, excitations
from senet.errors import UserError
from senet.gates.record import record_gates
from senet.models.cost import meta_model
from senet.nn.block import SqueezeExcitation

SIZES = {1: (24,), 2: (12, 12), 3: (6, 6, 6)}


def example(dims: int = 2, images: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(images, 3, *SIZES[dims], generator=generator)


# block, dims, name, squeeze, program, gate, limits, hidden, whether it is a module of its own
LAYERS = "conv2d 16→4, relu, conv2d 4→16"
LINEAR = "linear 16→4, relu, linear 4→16"
FORMS = {
    "ours": (lambda: SqueezeExcitation(16, 4), 2, "blocks.0", "avg", LINEAR, "sigmoid", 4, True),
    "ours, 1-d": (
        lambda: SqueezeExcitation(16, 4, dims=1, gate="tanh"),
        *(1, "blocks.0", "avg", LINEAR, "tanh", 4, True),
    ),
    "ours, NoSqueeze": (
        lambda: SqueezeExcitation(16, 4, squeeze="none"),
        *(2, "blocks.0", "none", LINEAR, "sigmoid", 4, True),
    ),
    "ours, identity": (
        lambda: SqueezeExcitation(16, 4, gate="identity_sigmoid", squeeze="max"),
        *(2, "blocks.0", "max", LINEAR, "identity_sigmoid", 4, True),
    ),
    "timm": (
        lambda: SEModule(16, rd_channels=4, norm_layer=nn.BatchNorm2d),
        *(2, "blocks.0", "avg", "conv2d 16→4, batch_norm, relu, conv2d 4→16", "sigmoid", 4, True),
    ),
    "timm, max": (
        lambda: SEModule(16, rd_channels=4, add_maxpool=True),
        *(2, "blocks.0", "avg+max", f"mul, mul, add, {LAYERS}", "sigmoid", 4, True),
    ),
    "ESE": (
        lambda: EffectiveSEModule(16),
        *(2, "blocks.0", "avg", "conv2d 16→16", "hard_sigmoid", None, True),
    ),
    "ECA": (
        lambda: EcaModule(16),
        *(2, "blocks.0", "avg", "conv1d 16→16", "sigmoid", None, True),
    ),
    "circular ECA": (
        lambda: CecaModule(16),
        *(2, "blocks.0", "avg", "pad, conv1d 18→16", "sigmoid", None, True),
    ),
    "CBAM": (
        lambda: CbamModule(16, rd_channels=4),
        *(2, "blocks.0.channel", "avg+max", f"{LAYERS}, {LAYERS}, add", "sigmoid", 4, True),
    ),
    "GlobalContext": (
        lambda: GlobalContext(16, rd_channels=4),
        *(2, "blocks.0", "attention", "conv2d 16→4, layer_norm, relu, conv2d 4→16", "sigmoid", 4),
        True,
    ),
    "MONAI": (
        lambda: MonaiChannelSE(16),
        *(2, "blocks.0", "avg", LINEAR, "sigmoid", 4, True),
    ),
    "MONAI, 3-d": (
        lambda: MonaiChannelSE(16, 3),
        *(3, "blocks.0", "avg", LINEAR, "sigmoid", 4, True),
    ),
    "MONAI, residual": (
        lambda: MonaiChannelSE(16, residual=True),
        *(2, "blocks.0.mul", "avg", LINEAR, "sigmoid", 4, False),
    ),
    "speechbrain": (
        lambda: SpeechBrainSE(16),
        *(1, "blocks.0", "avg", LAYERS.replace("2d", "1d"), "sigmoid", 4, True),
    ),
    "WeSpeaker": (lambda: WeSpeakerSE(16), 1, "blocks.0", "avg", LINEAR, "sigmoid", 4, True),
    "scSE": (lambda: ScSE(16), 2, "blocks.0.mul", "avg", LAYERS, "sigmoid", 4, False),
    "inlined MBConv": (
        lambda: InlinedMBConv(16),
        *(2, "blocks.0.mul", "avg", LAYERS.replace("relu", "silu"), "sigmoid", 4, False),
    ),
    "RepVGG": (lambda: RepVGGSE(16), 2, "blocks.0", "avg", LAYERS, "sigmoid", 4, True),
    "Lc0": (
        lambda: Lc0SE(16),
        *(2, "blocks.0", "avg", "linear 16→4, relu, linear 4→32", "sigmoid", 4, True),
    ),
    "HF RegNet": (lambda: HFRegNetSE(16), 2, "blocks.0", "avg", LAYERS, "sigmoid", 4, True),
    "HF EfficientNet": (
        lambda: HFEfficientNetSE(16),
        *(2, "blocks.0", "avg", LAYERS.replace("relu", "silu"), "sigmoid", 4, True),
    ),
    "old hard sigmoid": (
        lambda: OldHardSE(16),
        *(2, "blocks.0", "avg", "linear 16→16", "hard_sigmoid", None, True),
    ),
    "channels last": (
        lambda: ChannelsLastSE(16),
        *(2, "blocks.0", "avg", LINEAR, "sigmoid", 4, True),
    ),
    "SRM": (
        lambda: StdSE(16),
        *(2, "blocks.0", "avg+std", "stack, conv1d 32→16, batch_norm", "sigmoid", None, True),
    ),
}
LIMITS = {"sigmoid": (0, 1), "hard_sigmoid": (0, 1), "tanh": (-1, 1), "identity_sigmoid": (0, 2)}


def product_of(model: nn.Module, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a block and what comes out."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = block.register_forward_hook(lambda _m, i, o: seen.append((i[0].clone(), o)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[-1]


@separate_passes
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_found_named_and_recorded(form: str) -> None:
    torch.manual_seed(0)
    build, dims, name, squeeze, program, gate, hidden, own = FORMS[form]
    block = build()
    model, x = Body(block, dims=dims).eval(), example(dims)
    found = excitations(model, x)
    assert list(found) == [name]
    e = found[name]
    assert (e.channels, e.squeeze, e.gate, e.hidden) == (16, squeeze, gate, hidden)
    assert ", ".join(map(str, e.program)) == program
    assert e.limits == LIMITS[gate]
    assert (e.module is not None) == own
    assert e.shift == (form == "Lc0")
    assert e.places == tuple(size // 2 for size in SIZES[dims])
    statistics = record_gates(model, [x]).blocks[name]
    assert (statistics.gate, statistics.limits, statistics.hidden) == (gate, LIMITS[gate], hidden)
    # Against output ÷ input of the block, in double precision.
    model, x = model.double(), x.double()
    watched = model.get_submodule(name) if own else block
    before, after = product_of(model, watched, x)
    if form == "Lc0":
        gates = torch.sigmoid(block.fc2(F.relu(block.fc1(before.mean((2, 3)))))[:, :16])
    elif form == "inlined MBConv":
        middle = F.silu(block.bn1(block.depthwise(before)))
        z = block.se_expand(F.silu(block.se_reduce(middle.mean((2, 3), keepdim=True))))
        gates = torch.sigmoid(z).flatten(1)
    else:
        ratio = after / before
        if form == "scSE":
            ratio = ratio - block.sSE(before)
        if form == "MONAI, residual":
            ratio = ratio - 1
        gates = ratio.flatten(2).mean(2)
    again = record_gates(model, [x]).blocks[name]
    torch.testing.assert_close(again.mean, gates.detach().mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(statistics.mean, again.mean, rtol=0, atol=1e-6)


NONE = {
    AttentionOverPositions: "attention over positions",
    LayerNormScale: None,
    InstanceNormScale: "a normalisation",
    ResponseNorm: "a normalisation",
    ResidualScale: None,
    DynamicConvolution: "one factor for all channels",
    ConditionalWeights: None,
    SelectiveKernel: "softmax between branches",
    TwoMaps: None,
    CoordinateAttention: None,
    AdditiveAttention: "a normalisation or context vector",
    FirstPosition: None,
    Activation: None,
}


@pytest.mark.parametrize("kind", NONE, ids=lambda kind: kind.__name__)
def test_what_is_none_is_not_taken_for_one(kind: type[nn.Module]) -> None:
    seen = anatomy(Body(kind(16)), example())
    assert not seen.excitations
    assert not seen.unread
    reasons = list(seen.others.values())
    assert len(reasons) == (NONE[kind] is not None)
    assert all(reason.startswith(NONE[kind]) for reason in reasons)


class ByEinsum(HFRegNetSE):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,ncab->nchw", x, self.attention(self.pooler(x)))


class ByAddcmul(HFRegNetSE):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, x, self.attention(self.pooler(x)))


@pytest.mark.parametrize(("kind", "form"), [(ByEinsum, "einsum"), (ByAddcmul, "addcmul")])
def test_a_form_that_is_not_read_is_named(kind: type[HFRegNetSE], form: str) -> None:
    model = Body(kind(16)).eval()
    seen = anatomy(model, example())
    assert seen.others == {f"blocks.0.{form}": f"written as {form}: only map * gates is read as SE"}
    with pytest.raises(UserError, match=rf"{form}: only map \* gates is read as SE.*senet.insert"):
        record_gates(model, [example()])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant
@pytest.mark.parametrize("way", ["plain", "checkpoint", "reentrant", "twice", "tuple"])
def test_ways_to_run_a_block(way: str) -> None:
    block = InATuple(16) if way == "tuple" else HFRegNetSE(16)
    model = Body(block, way).eval()
    found = excitations(model, example())
    assert list(found) == ["blocks.0.se" if way == "tuple" else "blocks.0"]
    (e,) = found.values()
    assert len(e.sites) == (2 if way == "twice" else 1)
    statistics = record_gates(model, [example(), example(images=3)])
    assert next(iter(statistics.blocks.values())).count == 5 * len(e.sites)


def test_masked_squeeze_with_lengths() -> None:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.se = nn.Conv1d(3, 16, 3), SpeechBrainSE(16)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.se(self.conv(x), lengths)

    found = excitations(Speech(), (example(1), torch.tensor([0.5, 1.0])))
    assert [(e.name, e.squeeze) for e in found.values()] == [("se", "avg")]
    assert found["se"].squeezed == found["se"].scales == "conv1d in conv"


def test_maps_of_one_position_are_maps() -> None:
    """The last stages of small images."""
    model = torchvision.models.mobilenet_v3_small()
    names = list(excitations(model, torch.zeros(1, 3, 224, 224)))
    assert len(names) == 9
    assert list(excitations(model, torch.zeros(1, 3, 32, 32))) == names


def test_images_that_are_copied_into_a_batch_are_an_input() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body(HFRegNetSE(16))

        def forward(self, images: list[Tensor]) -> Tensor:
            batch = images[0].new_zeros(len(images), 3, 12, 12)
            for place, image in zip(batch, images, strict=True):
                place[:, : image.shape[1], : image.shape[2]].copy_(image)
            return self.body(batch)

    images = [torch.rand(3, 12, 9), torch.rand(3, 10, 12)]
    assert list(excitations(Detector(), (images,))) == ["body.blocks.0"]


def test_graphs_are_networks() -> None:
    model, x = Body(HFRegNetSE(16)).eval(), example()
    traced = torch.fx.symbolic_trace(model)
    assert list(excitations(traced, x)) == ["mul"]
    exported = torch.export.export(model, (x,)).module()
    (e,) = excitations(exported).values()  # the program knows its input
    assert (e.squeeze, e.gate, e.hidden, e.channels) == ("avg", "sigmoid", 4, 16)
    assert set(e.weights) == {
        f"blocks.0.attention.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    compiled = Body(torch.compile(HFRegNetSE(16)))
    assert list(excitations(compiled, x)) == ["blocks.0._orig_mod"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_what_cannot_be_read_is_named() -> None:
    model = Body(torch.jit.script(HFRegNetSE(16)))
    seen = anatomy(model, example())
    assert not seen.excitations
    assert "TorchScript" in seen.unread["blocks.0"]


def test_the_model_is_left_as_it_was() -> None:
    model = Body(SqueezeExcitation(16)).train()
    model.bn.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    excitations(model, example())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [model.training, model.bn.training, model.stem.training] == [True, False, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_examples_are_made_where_none_is_given() -> None:
    assert list(excitations(Body(HFRegNetSE(16)))) == ["blocks.0"]
    assert next(iter(excitations(timm.create_model("seresnet18")))) == "layer1.0.se"
    with pytest.raises(UserError, match="example_input is needed for Linear"):
        excitations(nn.Linear(3, 3))
    with pytest.raises(UserError, match="does not take example_input of shape"):
        excitations(Body(HFRegNetSE(16)), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    "name", ["se_resnet50", "se_inception_v3", "se_shufflenet_g3", "se_vgg16_bn", "se_mobilenet"]
)
def test_our_own_blocks_in_their_order(name: str) -> None:
    model = meta_model(name)
    own = [key for key, module in model.named_modules() if isinstance(module, SqueezeExcitation)]
    assert list(excitations(model)) == own
    assert not excitations(meta_model(name.removeprefix("se_")))


# Of gcresnet33ts the context is added, not a factor.
# Counted by the classes of the libraries; scripts/anatomy_table.py does it for all networks.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("efficientnet_b0", 16), ("rexnet_100", 13), ("ecaresnet26t", 8), ("gcresnet33ts", 0)),
        *(("regnety_002", 13), ("lcnet_050", 2), ("ghostnet_100", 7), ("legacy_seresnet18", 8)),
        *(("convnextv2_atto", 0), ("skresnet18", 0), ("resnet18", 0), ("swiftformer_xs", 0)),
    ],
)
def test_timm_networks(name: str, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(excitations(model)) == count


def test_senet_anatomy_is_public() -> None:
    assert senet.anatomy.excitations is excitations
