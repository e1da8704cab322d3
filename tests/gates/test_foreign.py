"""Recording and folding of SE blocks that are written in other ways, and of other batches."""

import copy
import json

import pytest
import torch
from foreign_blocks import (
    Body,
    ChannelsLastSE,
    HFEfficientNetSE,
    HFRegNetSE,
    InlinedMBConv,
    Lc0SE,
    MonaiChannelSE,
    OldHardSE,
    RepVGGSE,
    ScSE,
    SpeechBrainSE,
    WeSpeakerSE,
)
from timm.layers import EffectiveSEModule, SEModule
from torch import Tensor, nn

from senet.anatomy import excitations
from senet.errors import SenetError, UserError
from senet.gates import fold
from senet.gates.blocks import restructure
from senet.gates.fold import fold_gates
from senet.gates.listening import Listening
from senet.gates.record import record_gates

SIZES = {1: (24,), 2: (12, 12), 3: (6, 6, 6)}


def images(dims: int = 2) -> Tensor:
    return torch.randn(6, 3, *SIZES[dims], generator=torch.Generator().manual_seed(3))


def constant(model: nn.Module, x: Tensor, step: int = 1) -> nn.Module:
    """Every `step`-th gate of each block independent of the input, and batch norms that act."""
    with torch.no_grad():
        for e in excitations(model, x).values():
            layers = [n for n in e.occurrences[0].program if n.kind in ("conv", "linear")]
            weight, bias = (n.tensor for n in layers[-1].inputs[1:3])
            weight[::step] = 0
            bias.normal_(0, 1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.7, 1.3)
                module.weight.uniform_(0.7, 1.3)
    return model.eval()


FORMS = {
    "timm": (lambda: SEModule(16, rd_channels=4), 2, "removed"),
    "ESE": (lambda: EffectiveSEModule(16), 2, "removed"),
    "MONAI, 3-d": (lambda: MonaiChannelSE(16, 3), 3, "removed"),
    "MONAI, residual": (lambda: MonaiChannelSE(16, residual=True), 2, "constant"),
    "speechbrain": (lambda: SpeechBrainSE(16), 1, "removed"),
    "WeSpeaker": (lambda: WeSpeakerSE(16), 1, "removed"),
    "scSE": (lambda: ScSE(16), 2, "constant"),
    "inlined MBConv": (lambda: InlinedMBConv(16), 2, "removed"),
    "RepVGG": (lambda: RepVGGSE(16), 2, "removed"),
    "HF RegNet": (lambda: HFRegNetSE(16), 2, "removed"),
    "HF EfficientNet": (lambda: HFEfficientNetSE(16), 2, "removed"),
    "channels last": (lambda: ChannelsLastSE(16), 2, "removed"),
}


def same(a: Tensor, b: Tensor) -> None:
    """Equal up to the rounding of a few layers in float32."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_constant_gates_fold_and_leave_the_output(form: str) -> None:
    torch.manual_seed(1)
    build, dims, kind = FORMS[form]
    x = images(dims)
    model = constant(Body(build(), dims=dims), x)
    before = copy.deepcopy(model.state_dict())
    report = fold_gates(model, record_gates(model, [x]), tolerance=1e-7, example_input=x[:1])
    assert [block.kind for block in report.blocks] == [kind]
    assert not excitations(report.model, x)
    assert report.after.parameters < report.before.parameters
    with torch.no_grad():
        same(report.model(x), model(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # The structure alone rebuilds the folded network.
    structure = json.loads(json.dumps(report.structure))
    fresh = restructure(Body(build(), dims=dims), structure)
    fresh.load_state_dict(report.model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), report.model(x))


def test_moving_gates_do_not_fold_at_tolerance_0() -> None:
    torch.manual_seed(1)
    model = Body(InlinedMBConv(16)).eval()
    report = fold_gates(model, record_gates(model, [images()]), tolerance=0, example_input=images())
    assert [block.kind for block in report.blocks] == ["kept"]
    with torch.no_grad():
        assert torch.equal(report.model(images()), model(images()))


@pytest.mark.parametrize("block", [HFRegNetSE, RepVGGSE, SpeechBrainSE, HFEfficientNetSE])
def test_some_gates_fold_in_foreign_blocks(block: type[nn.Module]) -> None:
    torch.manual_seed(1)
    dims = 1 if block is SpeechBrainSE else 2
    x = images(dims)
    model = constant(Body(block(16), dims=dims), x, step=2)
    report = fold_gates(model, record_gates(model, [x]), tolerance=1e-7, example_input=x[:1])
    assert [(b.kind, b.folded) for b in report.blocks] == [("partial", 8)]
    with torch.no_grad():
        same(report.model(x), model(x))


def test_scale_and_shift_is_kept() -> None:
    model = constant(Body(Lc0SE(16)), images())
    statistics = record_gates(model, [images()])
    report = fold_gates(model, statistics, tolerance=1, example_input=images())
    assert [(b.kind, b.why) for b in report.blocks] == [("kept", "it also adds something")]


def test_a_single_layer_without_activation_folds_as_a_whole_only() -> None:
    model, x = Body(OldHardSE(16)).eval(), images()
    with torch.no_grad():
        model.blocks[0].fc.weight[::2] = 0
    report = fold_gates(model, record_gates(model, [x]), tolerance=1e-7, example_input=x)
    assert report.blocks[0].why == "OldHardSE folds as a whole only"


@pytest.mark.parametrize("form", ["traced", "exported"])
def test_graphs_are_recorded_and_folded(form: str) -> None:
    torch.manual_seed(1)
    x = images()
    plain = nn.Sequential(Body(HFRegNetSE(16)), nn.Unflatten(1, (5, 1)), nn.Flatten())
    plain[0].blocks.append(RepVGGSE(16))
    constant(plain, x)
    model = (
        torch.fx.symbolic_trace(plain)
        if form == "traced"
        else torch.export.export(plain, (x,)).module()
    )
    statistics = record_gates(model, [x])
    direct = record_gates(plain, [x])
    for a, b in zip(statistics.blocks.values(), direct.blocks.values(), strict=True):
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-6)
    report = fold_gates(model, statistics, tolerance=1e-6, example_input=x)
    assert [block.kind for block in report.blocks] == ["removed", "removed"]
    assert not excitations(report.model, x)
    with torch.no_grad():
        same(report.model(x), plain(x))
        assert len(excitations(model, x)) == 2


def test_a_wrong_fold_is_noticed_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the edits do: a network that computes something else is not returned."""
    model, x = constant(Body(HFRegNetSE(16)), images()), images()
    statistics = record_gates(model, [x])
    monkeypatch.setattr(fold, "edits_before", lambda *_: [lambda: None])
    report = fold_gates(model, statistics, tolerance=1e-6, example_input=x)
    assert report.blocks[0].kind == "kept"
    assert "would change the output" in report.blocks[0].why
    with torch.no_grad():
        assert torch.equal(report.model(x), model(x))


def test_what_is_no_product_of_map_and_gates_is_not_recorded() -> None:
    """Gates that are not the same at all positions, though they were when it was traced."""

    class Changing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = torch.sigmoid(x.mean((2, 3), keepdim=True) * 2)
            return x * (s if len(x) == 1 else s + torch.linspace(0, 1, x.shape[-1]))

    with pytest.raises(SenetError, match=r"blocks\.0 does not show its gates"):
        record_gates(Body(Changing()), [images()])


@pytest.mark.parametrize("keys", [("pixel_values", "labels"), ("image", "label")])
def test_batches_of_dicts(keys: tuple[str, str]) -> None:
    model, labels = Body(HFRegNetSE(16)), torch.arange(6) % 2
    plain = record_gates(model, [(images(), labels)])
    dicts = record_gates(model, [dict(zip(keys, (images(), labels), strict=True))])
    assert torch.equal(dicts.blocks["blocks.0"].class_mean, plain.blocks["blocks.0"].class_mean)
    report = fold_gates(
        model, dicts, tolerance=0, loader=[dict(zip(keys, (images(), labels), strict=True))]
    )
    assert report.before.top1 == report.after.top1 is not None
    with pytest.raises(UserError, match="a batch has the keys audio: its images must be"):
        record_gates(model, [{"audio": images()}])


def test_data_sorted_by_class_need_no_names() -> None:
    model, labels = Body(HFRegNetSE(16)), torch.tensor([0, 0, 1, 1, 2, 2])
    batches = [(images()[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    found = record_gates(model, batches)
    assert found.classes == ("0", "1", "2")
    whole = record_gates(model, [(images(), labels)], classes=("0", "1", "2"))
    for key in ("class_mean", "class_std"):
        torch.testing.assert_close(
            getattr(found.blocks["blocks.0"], key),
            getattr(whole.blocks["blocks.0"], key),
            rtol=1e-5,
            atol=1e-7,
        )
    a, b = (s.blocks["blocks.0"].class_histogram for s in (found, whole))
    assert torch.equal(a.counts, b.counts)
    with pytest.raises(UserError, match="labels must be class numbers"):
        record_gates(model, [(images(), torch.zeros(6, 4))])


def test_gates_can_be_put_in_place() -> None:
    model, x = Body(RepVGGSE(16)).eval(), images()
    ones = Listening(model, excitations(model, x), lambda *_: torch.ones(16))
    plain = copy.deepcopy(model)
    plain.blocks[0] = nn.Identity()
    with torch.no_grad():
        with ones:
            got = model(x)
        assert torch.equal(got, plain(x))
        assert not torch.equal(model(x), got)
