"""Our networks by the names they have in timm, and what is called otherwise there."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = MappingProxyType({})


class Ours(NamedTuple):
    """A network of ours: its name and the options with which it is the other one."""

    name: str
    options: Mapping[str, Any] = _NONE


# timm rounds hidden widths to multiples of 8, which changes those of the two small networks only.
_ROUNDED = {"divisor": 8}
_CAFFE, _CADENE = {"variant": "caffe"}, {"variant": "cadene"}

# timm's name → ours, where the architecture is the same. Those that are no names of ours are
# aliases; `legacy_*` have the structure of the authors' Caffe definitions.
TIMM_NAMES: dict[str, Ours] = {
    **{f"seresnet{depth}": Ours(f"se_resnet{depth}", _ROUNDED) for depth in (18, 34)},
    **{f"seresnet{depth}": Ours(f"se_resnet{depth}") for depth in (50, 101, 152)},
    **{
        f"seresnext{size}": Ours(f"se_resnext{size}")
        for size in ("50_32x4d", "101_32x4d", "101_32x8d", "101_64x4d")
    },
    "senet154": Ours("senet154"),
    "legacy_senet154": Ours("senet154", _CAFFE),
    **{f"legacy_seresnet{depth}": Ours(f"se_resnet{depth}", _CADENE) for depth in (18, 34)},
    **{f"legacy_seresnet{depth}": Ours(f"se_resnet{depth}", _CAFFE) for depth in (50, 101, 152)},
    **{
        f"legacy_seresnext{size}": Ours(f"se_resnext{size}", _CAFFE)
        for size in ("26_32x4d", "50_32x4d", "101_32x4d")
    },
    **{f"resnet{depth}": Ours(f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    **{
        f"resnext{size}": Ours(f"resnext{size}")
        for size in ("50_32x4d", "101_32x4d", "101_32x8d", "101_64x4d")
    },
    "inception_v3": Ours("inception_v3"),
    "inception_resnet_v2": Ours("inception_resnet_v2"),
    "vgg16_bn": Ours("vgg16_bn"),
}

_SEMI_SUPERVISED = ("50_32x4d", "101_32x4d", "101_32x8d")
# Names that timm gave up for a network and a tag, and still takes.
FORMER_TIMM_NAMES: dict[str, str] = {
    **{f"tv_resnet{depth}": f"resnet{depth}.tv_in1k" for depth in (34, 50, 101, 152)},
    "tv_resnext50_32x4d": "resnext50_32x4d.tv_in1k",
    **{f"gluon_resnet{depth}_v1b": f"resnet{depth}.gluon_in1k" for depth in (18, 34, 50, 101, 152)},
    **{
        f"gluon_{kind}{size}": f"{kind}{size}.gluon_in1k"
        for kind in ("resnext", "seresnext")
        for size in ("50_32x4d", "101_32x4d", "101_64x4d")
    },
    "gluon_senet154": "senet154.gluon_in1k",
    **{
        f"{short}_{name}": f"{name}.{tag}"
        for short, tag in (("ssl", "fb_ssl_yfcc100m_ft_in1k"), ("swsl", "fb_swsl_ig1b_ft_in1k"))
        for name in ("resnet18", "resnet50", *(f"resnext{size}" for size in _SEMI_SUPERVISED))
    },
    "ig_resnext101_32x8d": "resnext101_32x8d.fb_wsl_ig1b_ft_in1k",
    "tf_inception_v3": "inception_v3.tf_in1k",
    "adv_inception_v3": "inception_v3.tf_adv_in1k",
    "gluon_inception_v3": "inception_v3.gluon_in1k",
    "ens_adv_inception_resnet_v2": "inception_resnet_v2.tf_ens_adv_in1k",
}


class Asked(NamedTuple):
    """What a name of a network asks for.

    Attributes:
        name: our network; where no alias is known the name itself, which may be none of ours.
        options: of that network.
        timm: timm's name of it, if it was given by one that is no name of ours.
        tag: which weights, if the name says it.
    """

    name: str
    options: Mapping[str, Any] = _NONE
    timm: str | None = None
    tag: str | None = None


def split_tag(name: str) -> Asked:
    """What a name asks for: `se_resnet50`, `seresnet50`, `legacy_senet154.in1k`, ….

    The dots of `timm:resnet50.a1_in1k` and `FILE.py:FUNCTION` are none of ours.
    """
    if ":" in name:
        return Asked(name)
    network, _, tag = FORMER_TIMM_NAMES.get(name, name).partition(".")
    ours = TIMM_NAMES.get(network)
    if ours is None or ours.name == network:
        return Asked(network, tag=tag or None)
    return Asked(ours.name, ours.options, network, tag or None)


_ANOTHER = "is another ResNet"
# timm's networks that are near ours but not the same, and what is different.
_DIFFERENT = (
    (r"mobilenetv1_", "has ReLU6 where the paper's MobileNet has ReLU"),
    (r"mobilenet(v[2-5]|_edgetpu)", "is a later MobileNet"),
    (r"shufflenet_v2", "is ShuffleNet's second version"),
    (r"(se)?res(net|next)\d+[acdst]+(_|$)", "has another stem or other shortcuts"),
    (r"ecaresne|skresne|resnest|wide_resnet|resnet(v2_|aa|blur|rs)|seresne\w*aa", _ANOTHER),
    (r"inception_(v4|next)", "is another Inception"),
)


def why_not(name: str) -> str:
    """What makes a network of timm none of ours, for the message that it is unknown; "" if so."""
    for pattern, difference in _DIFFERENT:
        if re.match(pattern, name):
            return f" (timm's {difference}: timm:{name} takes it as it is)"
    return ""
