"""Networks by name, with weights."""

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

from senet.errors import UserError
from senet.models import Network, SEOptions, build_model
from senet.models.elsewhere import split_tag
from senet.models.features import FeatureList, feature_list
from senet.weights import load_weights
from senet.weights.files import HUB_PREFIX
from senet.weights.released import Released, find_released


@overload
def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    pretrained: str | PathLike[str] | bool | None = None,
    features_only: Literal[False] = False,
    **options: Any,
) -> Network: ...


@overload
def create_model(
    name: str,
    *,
    in_channels: int = 3,
    pretrained: str | PathLike[str] | bool | None = None,
    features_only: Literal[True],
    out_indices: Sequence[int] | int | None = None,
    **options: Any,
) -> FeatureList: ...


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    pretrained: str | PathLike[str] | bool | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
    **options: Any,
) -> Network | FeatureList:
    """A network of the paper by name.

    Args:
        name: one of `list_models()`: `resnet50`, `se_resnet50`, `senet154`, …; or timm's name of
            one of them: `seresnet50`, `legacy_senet154`, …. Behind a dot may stand which released
            weights are meant: `se_resnet50.ra2_in1k`, `seresnet50.ra2_in1k`.
        num_classes: classes of the head; 0 for none (the network returns pooled features).
        in_channels: channels of the images.
        pretrained: weights to load. True: the best released ones of this network, or those that
            `name` says, from the Hugging Face Hub; a tag: others (`"a1_in1k"`, see
            `senet.weights.released`). Or a .safetensors or .pth file in any released layout (see
            `load_weights`, which also adapts the network to them), or `hf_hub:owner/name`. A
            last layer for another number of classes than a `num_classes` other than 1000 is left
            out, and the network's own one kept, for fine-tuning. What was done goes to the
            logger "senet". None and False: freshly initialised, a function of PyTorch's global
            seed.
        features_only: give the network's feature maps as a list, without classifier, see
            `senet.models.features.feature_list`; `senet.features(model)` gives them by name.
        out_indices: with it, which maps: number i is that of stage i + 1, whose stride in ImageNet
            networks is 2**(i + 1); or how many of the last. None for all.
        **options: of SE networks `reduction` (16), `squeeze` ("avg"), `gate` ("sigmoid"),
            `integration` ("standard"), `stages` (all), `bias` (True), `divisor` (1), see
            `SEOptions`; of ImageNet ResNets `variant` ("torch", "caffe" or "cadene"); of some
            networks `dropout`; of inception_v3 `aux` (False), of mobilenet `width` (1.0), of
            resnet110_cifar `preactivation` (False).

    Returns:
        The network, in training mode, float32, on PyTorch's default device. With released weights,
        or a name that says which, its `preprocessing` is theirs.

    Raises:
        UserError: unknown name (the closest is named), an option the network does not have, a
            value out of range, `pretrained` of another kind, weights that do not fit, or that
            cannot be fetched.
    """
    if not (pretrained is None or isinstance(pretrained, bool | str | PathLike)):
        raise UserError(
            f"pretrained must be True, a tag, a file, hf_hub:owner/name or None, got "
            f"{pretrained!r}; tensors in memory go through senet.load_weights(model, tensors)"
        )
    if out_indices is not None and not features_only:
        raise UserError("out_indices says which maps features_only=True gives: give that too")
    released = _released(name, pretrained)
    if released is not None:
        name, options = released.network, {**released.options, **options}
    model = build_model(name, num_classes=num_classes, in_channels=in_channels, **options)
    if pretrained:
        _load(model, released, pretrained)
    if released is not None:
        model.preprocessing = released.preprocessing_of(in_channels)
    return feature_list(model, out_indices) if features_only else model


def _released(name: str, pretrained: str | PathLike[str] | bool | None) -> Released | None:
    """The released weights that a call means; None where it means none or others."""
    tag = pretrained if isinstance(pretrained, str) and _is_tag(pretrained) else None
    if pretrained is True or tag is not None or split_tag(name).tag is not None:
        return find_released(name, tag)
    return None


def _is_tag(text: str) -> bool:
    """Whether `pretrained` is no file and no repository, but says which released weights."""
    return bool(text) and not text.startswith(HUB_PREFIX) and not _is_file(text)


def _is_file(text: str) -> bool:
    path = Path(text)
    return path.exists() or len(path.parts) > 1 or path.suffix in (".safetensors", ".pth", ".pt")


def _load(
    model: Network, released: Released | None, pretrained: str | PathLike[str] | bool
) -> None:
    config = model.config
    if released is not None:
        _check_structure(model, released)
    own = pretrained is True or (isinstance(pretrained, str) and _is_tag(pretrained))
    source = released.file() if own and released is not None else pretrained
    assert not isinstance(source, bool)
    report = load_weights(model, source, new_head=config["num_classes"] != 1000)
    what = source if released is None else released.name
    head = f"; {model.head} is new, for {config['num_classes']} classes" if report.kept else ""
    logging.getLogger("senet").info("%s: %s: %s%s", config["name"], what, report, head)


def _check_structure(model: Network, released: Released) -> None:
    """Raise UserError for options that the weights' shapes do not show and that change them."""
    for option in ("squeeze", "gate", "integration"):
        given, theirs = model.config["options"].get(option), getattr(SEOptions(), option)
        if given not in (None, theirs):
            raise UserError(
                f"{released.name} are weights of a network with {option}={theirs!r}, not "
                f"{given!r}: leave {option} out, or give a file of your own (pretrained=FILE)"
            )
