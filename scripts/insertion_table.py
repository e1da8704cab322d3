"""Insert SE into networks of torchvision, timm and this package, and write docs/insertion_table.md.

Weights are random and batch-norm statistics randomised, so that nothing is hidden by a layer that
does nothing. For each network: are the outputs before and after bit-identical, in evaluation and
in training mode with the same seed (float32, eager)? Is the gradient of the new weights not zero?

    python scripts/insertion_table.py [NAME …]      # names as in MODELS, all by default
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import senet
from senet.errors import UserError
from senet.insertion.insert import insert, inserted_places, remove

# Family → networks: "tv:" torchvision, "video:" its 3-d networks, "timm:" timm, "senet:" ours.
MODELS: dict[str, tuple[str, ...]] = {
    "ResNet": ("senet:resnet50", "senet:resnet20_cifar", "senet:resnet164_cifar", "tv:resnet18",
               "tv:resnet50", "tv:wide_resnet50_2", "timm:resnet26d", "timm:resnetv2_50"),
    "ResNeXt": ("senet:resnext50_32x4d", "tv:resnext50_32x4d"),
    "Res2Net": ("timm:res2net50_26w_4s",),
    "SENet-154, plain": ("senet:senet154_plain",),
    "VGG": ("senet:vgg16_bn", "tv:vgg11", "tv:vgg16_bn"),
    "AlexNet": ("tv:alexnet",),
    "SqueezeNet": ("tv:squeezenet1_1",),
    "Inception": ("senet:bn_inception", "senet:inception_resnet_v2", "tv:googlenet",
                  "tv:inception_v3", "timm:inception_v4", "timm:inception_resnet_v2"),
    "DenseNet": ("tv:densenet121", "timm:densenet121"),
    "MobileNet v1": ("senet:mobilenet", "timm:mobilenetv1_100"),
    "MobileNet v2": ("tv:mobilenet_v2", "timm:mobilenetv2_050", "timm:efficientnet_lite0"),
    "MNASNet, FBNet": ("tv:mnasnet0_5", "timm:fbnetc_100"),
    "ShuffleNet v1": ("senet:shufflenet_g3",),
    "ShuffleNet v2": ("tv:shufflenet_v2_x0_5",),
    "RegNet X": ("tv:regnet_x_400mf", "timm:regnetx_002"),
    "ConvNeXt": ("tv:convnext_tiny", "timm:convnext_atto", "timm:convnext_tiny",
                 "timm:convnextv2_atto"),
    "Darknet, CSP": ("timm:darknet53", "timm:cspresnet50", "timm:cspdarknet53"),
    "DPN": ("timm:dpn68",),
    "DLA": ("timm:dla34",),
    "HRNet": ("timm:hrnet_w18_small",),
    "VoVNet": ("timm:vovnet39a",),
    "RepVGG, MobileOne": ("timm:repvgg_a0", "timm:mobileone_s0"),
    "Xception": ("timm:xception41",),
    "GENet": ("timm:gernet_s",),
    "SelecSLS": ("timm:selecsls42",),
    "ConvMixer": ("timm:convmixer_768_32",),
    "PoolFormer": ("timm:poolformer_s12",),
    "InceptionNeXt": ("timm:inception_next_atto",),
    "FasterNet, StarNet": ("timm:fasternet_t0", "timm:starnet_s1"),
    "EfficientViT, EdgeNeXt": ("timm:efficientvit_b0", "timm:edgenext_xx_small"),
    "3-d ResNet": ("video:r3d_18", "video:mc3_18", "video:r2plus1d_18"),
    "Segmentation": ("seg:fcn_resnet50", "seg:deeplabv3_mobilenet_v3_large"),
    "Already with SE": ("senet:se_resnet50", "tv:mobilenet_v3_small", "tv:efficientnet_b0",
                        "tv:regnet_y_400mf", "timm:nfnet_l0", "timm:ghostnet_100",
                        "timm:legacy_seresnet50"),
    "No convolution to follow": ("timm:mixer_s16_224",),
}  # fmt: skip
SIDES = {"alexnet": 96, "inception_v3": 299, "inception": 128, "mixer": 224}
OUT = Path(__file__).parents[1] / "docs" / "insertion_table.md"


@dataclass(frozen=True)
class Row:
    """What insertion did to one network.

    Attributes:
        model: its name.
        places: SE blocks inserted.
        kinds: how they were found.
        parameters: parameters before.
        added: parameters added.
        eval_equal: outputs bit-identical in evaluation mode.
        train_equal: outputs bit-identical in training mode, same seed.
        trainable: whether every block's last layer gets a gradient that is not zero, with the
            batch norms' recorded statistics and an input that `insert` did not see.
        undone: whether `remove` gives the first state dict and output back.
        reason: why it was refused.
    """

    model: str
    places: int = 0
    kinds: str = ""
    parameters: int = 0
    added: int = 0
    eval_equal: bool = False
    train_equal: bool = False
    trainable: bool = False
    undone: bool = False
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether everything that insertion promises holds."""
        return self.eval_equal and self.train_equal and self.trainable and self.undone


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights and batch-norm statistics, and an input for it."""
    source, _, key = name.partition(":")
    torch.manual_seed(0)
    side = next((n for part, n in SIDES.items() if part in key), 64)
    shape: tuple[int, ...] = (2, 3, side, side)
    if source == "senet":
        model: nn.Module = senet.create_model(key, num_classes=10)
    elif source == "timm":
        model = timm.create_model(key, num_classes=10)
    elif source == "video":
        model, shape = torchvision.models.get_model(key, num_classes=10), (2, 3, 8, 32, 32)
    elif source == "seg":
        model = torchvision.models.get_model(key, weights=None, weights_backbone=None)
    else:
        extra = {"init_weights": False} if key in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(key, num_classes=10, **extra)
    randomise_norms(model)
    return model, torch.randn(shape)


def randomise_norms(model: nn.Module) -> None:
    """Give batch norms statistics and affine weights as a trained network has them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.7, 1.3)
                if module.affine:
                    module.weight.uniform_(0.7, 1.3)
                    module.bias.normal_(0, 0.1)


def outputs(model: nn.Module, x: Tensor, *, training: bool) -> list[Tensor]:
    """All tensors that the model returns, random numbers seeded."""
    model.train(training)
    torch.manual_seed(1)
    return [t for t in torch.utils._pytree.tree_leaves(model(x)) if isinstance(t, Tensor)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all tensors are finite and bit-identical."""
    pairs = zip(a, b, strict=True)
    return all(bool(x.isfinite().all()) and torch.equal(x, y) for x, y in pairs)


def examine(name: str) -> Row:
    """Insert SE into one network and check all that is promised."""
    model, x = build(name)
    original = copy.deepcopy(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = sum(p.numel() for p in model.parameters())
    try:
        report = insert(model, example_input=x)
    except UserError as error:
        return Row(name, parameters=parameters, reason=str(error))
    with torch.no_grad():
        eval_equal = same(outputs(original, x, training=False), outputs(model, x, training=False))
    before = outputs(copy.deepcopy(original), x, training=True)
    after = outputs(copy.deepcopy(model), x, training=True)
    # With the recorded statistics, as where gates alone are trained, and on another input.
    trained = copy.deepcopy(model)
    squares = [t.square().mean() for t in outputs(trained, x.flip(-1), training=False)]
    torch.stack(squares).sum().backward()
    blocks: list[Any] = [trained.get_submodule(place.block) for place in inserted_places(trained)]
    gradients = [float(block.fc2.weight.grad.abs().sum()) for block in blocks]
    remove(model)
    now = model.state_dict()
    undone = list(now) == list(state) and all(torch.equal(now[k], v) for k, v in state.items())
    with torch.no_grad():
        undone &= same(outputs(original, x, training=False), outputs(model, x, training=False))
    kinds = [place.kind for place in report.places]
    return Row(
        model=name,
        places=len(kinds),
        kinds=", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds)),
        parameters=parameters,
        added=report.parameters,
        eval_equal=eval_equal,
        train_equal=same(before, after),
        trainable=all(g > 0 for g in gradients),
        undone=undone,
    )


def table(rows: dict[str, list[Row]]) -> str:
    """The rows as Markdown."""
    done = [row for each in rows.values() for row in each if not row.reason]
    families = sum(any(not row.reason for row in each) for each in rows.values())
    mark = {True: "yes", False: "**no**"}
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm "
    lines = [
        "# Insertion into known networks",
        "",
        f"Written by `scripts/insertion_table.py` ({versions}{timm.__version__}; CPU, float32, "
        "eager; random weights, randomised batch-norm statistics).",
        "",
        f"{len(done)} networks of {families} families take SE, {sum(r.good for r in done)} of them "
        "with all four properties: output bit-identical in evaluation mode, and in training mode "
        "with the same seed; a gradient that is not zero in every inserted block's last layer "
        "(batch norms with their recorded statistics, an input that `insert` did not see); "
        "`senet.remove` gives the first state dict and output back. `tv` is torchvision, `seg` and "
        "`video` its segmentation and video networks.",
        "",
        "| family | network | SE blocks | parameters added | eval | train | gradient | undone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    refused = []
    for family, each in rows.items():
        for row in each:
            if row.reason:
                refused.append(f"| `{row.model}` | {row.reason} |")
                continue
            flags = (row.eval_equal, row.train_equal, row.trainable, row.undone)
            lines.append(
                f"| {family} | `{row.model}` | {row.kinds} | {row.added:,} "
                f"(+{100 * row.added / row.parameters:.1f}%) | "
                + " | ".join(mark[flag] for flag in flags)
                + " |"
            )
    lines += ["", "Refused, with what the user reads:", "", "| network | reason |", "|---|---|"]
    return "\n".join([*lines, *refused, ""])


def main(names: list[str]) -> int:
    """Print a line a network; write the table if all networks were asked for."""
    rows = {
        family: [examine(name) for name in each if not names or name in names]
        for family, each in MODELS.items()
    }
    for row in (row for each in rows.values() for row in each):
        print(row)
    if not names:
        OUT.write_text(table(rows), encoding="utf-8")
    return 0 if all(row.good or row.reason for each in rows.values() for row in each) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
