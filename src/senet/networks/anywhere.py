"""Networks from anywhere by one name."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from senet.anatomy.recording import evaluating
from senet.errors import UserError
from senet.insertion.replace import take_out
from senet.models import build_model
from senet.networks.preparation import imagenet, of_timm, of_torchvision
from senet.networks.stem import adapt_stem
from senet.support.extras import optional
from senet.support.trust import check_trusted

if TYPE_CHECKING:
    from senet.data import Preprocessing

TORCHVISION, TIMM = "torchvision:", "timm:"
PREFIXES = (TORCHVISION, TIMM)
PYTHON = "python:"  # of a module that senet.training.fit was given, with its class
WITHOUT_SE = "without_se"
OPTIONS = (WITHOUT_SE,)  # of foreign networks


def is_foreign(name: str) -> bool:
    """Whether a network's name is of timm, of torchvision, or of a file."""
    return name.startswith(PREFIXES) or ".py:" in name


def channels_of(name: str) -> int | None:
    """How many channels a foreign network is made for; None where it is asked."""
    return 3 if is_foreign(name) and not name.startswith(TIMM) else None


def open_source(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    named_by_user: bool = True,
    **options: Any,
) -> nn.Module:
    """A freshly initialised network by name.

    Args:
        name: one of `list_models()`, `torchvision:NAME`, `timm:NAME`, or `FILE.py:FUNCTION`, a
            function that returns a module; it is given num_classes and in_channels if it has such
            parameters.
            Only name files you trust: they are run.
        named_by_user: False where the name comes from a file that may be a stranger's: then a
            `FILE.py` is run only if its content was named by this user before (kept by SHA-256 in
            `~/.cache/senet/trusted_files`), or if SENET_TRUST_CODE is 1.
        num_classes: classes of the head; by default 1000, and of a `FILE.py:FUNCTION` as many as
            the function gives by itself, 1000 where it has to be told.
        in_channels: channels of the images; other than 3, the first convolution of networks of
            torchvision and of files that do not take them is made for so many (`adapt_stem`).
        **options: for networks of this package, see `create_model`; for others `without_se`: True
            takes the SE blocks out that it is built with. The other weights start as with them.

    Returns:
        The network; foreign ones get the attributes `config`, `input_size`, `min_input_size`,
        `classes`, `metrics` and `preprocessing` that networks of this package have: the last as
        timm or torchvision say it of their weights, ImageNet's for files.

    Raises:
        UserError: no such network, the package is not installed, an option that it does not have,
            or `without_se` where no SE block can be taken out.
    """
    if name.startswith(PYTHON):
        raise UserError(
            f"only your code makes {name.removeprefix(PYTHON)}, which senet.training.fit was "
            "given: make it there, and call senet.training.restore(model, RUN)"
        )
    if is_foreign(name):
        check_options(name, options)
        model, preparation = _foreign(name, num_classes, in_channels, named_by_user)
        size = preparation.image_size
        if num_classes is None:
            num_classes = 1000 if name.startswith(PREFIXES) else _outputs(model, in_channels, size)
        if options.get(WITHOUT_SE):  # of a file nobody knows the size
            known = name.startswith(PREFIXES)
            take_out(model, torch.zeros(1, in_channels, size, size) if known else None)
        config = {"name": name, "num_classes": num_classes, "in_channels": in_channels}
        about = {
            "config": {**config, "options": options},
            "input_size": (in_channels, size, size),
            "min_input_size": 1,  # unknown: the network itself refuses what is too small
            "preprocessing": preparation.to_dict(),
            "classes": None,  # nobody says their names yet
            "metrics": None,
        }
        for key, value in about.items():
            setattr(model, key, value)
        return model
    if num_classes is not None:
        options["num_classes"] = num_classes
    return build_model(name, in_channels=in_channels, **options)


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise UserError for an option that a foreign network does not have."""
    if wrong := [option for option in options if option not in OPTIONS]:
        raise UserError(f"{name} takes no options but {', '.join(OPTIONS)}, got {', '.join(wrong)}")


def _foreign(
    name: str, num_classes: int | None, in_channels: int, named_by_user: bool
) -> tuple[nn.Module, Preprocessing]:
    if name.startswith(TORCHVISION):
        name = name.removeprefix(TORCHVISION)
        model, preparation = _torchvision(name, num_classes or 1000), of_torchvision(name)
        if in_channels != 3:
            adapt_stem(model, in_channels, fresh=True)
        return model, preparation.with_channels(in_channels)
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), num_classes or 1000, in_channels)
    model = _from_file(name, num_classes, in_channels, named_by_user)
    return model, imagenet().with_channels(in_channels)


def _torchvision(name: str, num_classes: int) -> nn.Module:
    models = optional("torchvision.models")

    if name not in models.list_models():
        raise UserError(f"torchvision has no model {name!r}{_close(name, models.list_models())}")
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=num_classes, **extra)


def _timm(name: str, num_classes: int, in_channels: int) -> tuple[nn.Module, Preprocessing]:
    timm = optional("timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{_close(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    return model, of_timm(model, in_channels)


def _close(name: str, names: list[str]) -> str:
    import difflib

    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _from_file(
    name: str, num_classes: int | None, in_channels: int, named_by_user: bool
) -> nn.Module:
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"model {name}: no such file: {path}")
    check_trusted(name, named_by=None if named_by_user else "the checkpoint")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    factory: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(factory):
        raise UserError(f"model {name}: {path} has no function {function!r}")
    parameters = inspect.signature(factory).parameters
    asked = parameters.get("num_classes")
    if num_classes is None and asked is not None and asked.default is asked.empty:
        num_classes = 1000
    given = {} if asked is None or num_classes is None else {"num_classes": num_classes}
    if knows := "in_channels" in parameters:
        given["in_channels"] = in_channels
    model = factory(**given)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name}: {function} returns {type(model).__name__}, not a module")
    if in_channels != 3 and not knows:
        adapt_stem(model, in_channels, fresh=True)
    return model


@torch.no_grad()
def _outputs(model: nn.Module, channels: int, size: int) -> int:
    """Logits that a network gives, 1000 where it says nothing of the kind for images of a size."""
    try:
        with evaluating(model):
            logits = model(torch.zeros(1, channels, size, size))
    except (RuntimeError, ValueError, TypeError):  # other inputs are expected
        return 1000
    plain = isinstance(logits, torch.Tensor) and logits.ndim == 2
    return int(logits.shape[1]) if plain else 1000


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """The classifier: the last linear layer with one output a class, and its name.

    Raises:
        UserError: there is none.
    """
    classes = getattr(model, "config", {}).get("num_classes")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.out_features == classes
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear layer with {classes} outputs as its head: "
            "train it with --train se or all on data with its own classes"
        )
    return found[-1]


def new_head(model: nn.Module, num_classes: int) -> None:
    """Replace the classifier by a fresh one for another number of classes."""
    name, old = head_of(model)
    fresh = nn.Linear(old.in_features, num_classes, old.bias is not None)
    model.set_submodule(name, fresh.to(old.weight.device, old.weight.dtype))
    model.config = {**model.config, "num_classes": num_classes}  # type: ignore[assignment,dict-item]
