"""Checkpoints opened: verified, self-contained, nothing unpickled.

A checkpoint is a folder: `model.safetensors` holds the weights to use, with all that is needed to
use them in its metadata, `manifest.json` the size and SHA-256 of each file. One of a run holds its
`training_state.pt` too. What `save_pretrained` writes has no manifest.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from senet.checkpoint.write import MANIFEST, defect
from senet.data import Preprocessing
from senet.errors import SenetError, UserError
from senet.gates.blocks import restructure
from senet.insertion.insert import attach
from senet.insertion.report import Place
from senet.models import Network, build_model
from senet.models.description import FORMAT, WEIGHTS, adopt, read_described
from senet.models.hub import HUB_CONFIG
from senet.networks.anywhere import is_foreign, open_source
from senet.networks.preparation import imagenet_classes
from senet.tasks.kinds import AnyTask, from_dict
from senet.weights import HUB_PREFIX, load_weights, local_file
from senet.weights.files import UNREADABLE, read_contents
from senet.weights.layouts import detect
from senet.weights.released import Released, is_pretrained, released_or_file
from senet.weights.select import select


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and all that is needed to use it.

    Attributes:
        model: the network with its weights, in evaluation mode, on the CPU; with `preprocessing`,
            `classes`, `task` and `metrics`, so that `model.save_pretrained` tells them too.
        classes: names in the order of the outputs; their numbers where nobody knows the names
            (`model.classes` is None then).
        preprocessing: how an image becomes its input.
        metrics: the row of metrics.csv that belongs to the weights; empty within the first epoch.
        config: the options of the run that its result depends on, see
            `RunConfig.result_options`; empty for a network that is not of a run folder.
        path: the file that was read.
    """

    model: Network
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    metrics: dict[str, float]
    config: dict[str, Any]
    path: Path

    @property
    def task(self) -> AnyTask:
        """What its outputs are."""
        return from_dict(getattr(self.model, "task", None), self.classes)


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """A trained network: a run folder, a checkpoint folder, a model.safetensors, or published.

    Published ones are folders that `save_pretrained` made, and `hf_hub:owner/name`. Of a run
    folder it takes the best checkpoint, else the last, else the one before; a corrupt
    one is named in a warning and passed over. Nothing is unpickled.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: it is no checkpoint of this package.
        SenetError: it is one, but corrupt.
    """
    if str(path).startswith(HUB_PREFIX):
        return _read(local_file(str(path)))
    if is_pretrained(path):
        raise UserError(
            f"{path} means released weights, which do not say of which network: give --model too "
            "(senet models --pretrained lists them)"
        )
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: give a run folder, one of its checkpoints, or a {WEIGHTS}"
        )
    if path.is_file():
        return _read(path)
    if (path / HUB_CONFIG).exists() and (path / WEIGHTS).exists():
        return _read(path / WEIGHTS)  # save_pretrained writes no manifest
    if (path / WEIGHTS).exists() or (path / MANIFEST).exists():
        candidates = [path]
    else:
        inner = path / "checkpoints"
        candidates = [inner / slot for slot in ("best", "last", "previous")]
        candidates = [folder for folder in candidates if folder.exists()]
    if not candidates:
        raise UserError(
            f"{path} holds no checkpoint: give a run folder with checkpoints/, "
            f"one of its checkpoints, or a {WEIGHTS}"
        )
    for folder in candidates:
        why = defect(folder)
        if why is None:
            return _read(folder / WEIGHTS)
        if folder is not candidates[-1]:
            warnings.warn(f"{folder} is corrupt ({why}): it is left out", stacklevel=2)
    raise SenetError(f"{candidates[-1]} is corrupt ({why})")


def rebuild(config: Mapping[str, Any]) -> nn.Module:
    """A network from its `config`: freshly initialised, with inserted and folded blocks.

    Args:
        config: name, num_classes, in_channels, options, and as the case may be `inserted` (of
            `senet.insert`) and `folded` (of `senet.fold_gates`).

    Raises:
        UserError: as for `open_source`.
    """
    model = open_source(
        config["name"],
        num_classes=config["num_classes"],
        in_channels=config["in_channels"],
        named_by_user=False,
        **config["options"],
    )
    if "inserted" in config:
        inserted = config["inserted"]
        attach(model, [Place(**place) for place in inserted["places"]], gate=inserted["gate"])
    if "folded" in config:
        model = restructure(model, config["folded"])
        former = model.config
        assert isinstance(former, dict)
        model.config = {**former, "folded": config["folded"]}  # type: ignore[assignment]
    return model


def _read(path: Path) -> Checkpoint:
    description, weights = read_described(path)
    try:
        model = rebuild(description["model"])
        model.load_state_dict(weights)
        adopt(model, description)
        # A foreign network (see `rebuild`) has the attributes of ours that are needed.
        return _checkpoint(cast(Network, model), description["run"], path)
    except SenetError:
        raise
    except (ArithmeticError, *UNREADABLE) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{path} is damaged: its weights and its description do not go together ({reason})"
        ) from error


def _checkpoint(model: Network, run: dict[str, Any], path: Path) -> Checkpoint:
    if model.preprocessing is None:
        raise UserError(
            f"{path} does not say how an image becomes the network's input: open it in Python, set "
            "model.preprocessing, and write it with model.save_pretrained(FOLDER)"
        )
    count = model.config["num_classes"]
    if not count:
        raise UserError(f"{path} holds a network without classes: it cannot be used to classify")
    checkpoint = Checkpoint(
        model=model.eval(),
        classes=model.classes or tuple(map(str, range(count))),
        preprocessing=Preprocessing.from_dict(model.preprocessing),
        metrics=dict(model.metrics or {}),
        config=run,
        path=path,
    )
    if len(checkpoint.task.names) != count:  # read now: a damaged one is told when it is opened
        raise ValueError(f"{count} outputs, {len(checkpoint.task.names)} names")
    return checkpoint


def is_described(path: str | PathLike[str]) -> bool:
    """Whether a checkpoint says itself which network it is for; other files hold weights alone.

    Args:
        path: a file, a folder, `hf_hub:owner/name`, or `pretrained`.
    """
    if is_pretrained(path):
        return False
    if str(path).startswith(HUB_PREFIX):
        path = local_file(str(path))
    path = Path(path)
    if not path.is_file():
        return True  # a folder, which holds what this package wrote
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True  # whoever opens it says what is wrong


def model_for_weights(
    name: str, source: str | PathLike[str], *, fresh_head: bool = False, **options: Any
) -> Network:
    """A network of a given name with weights from elsewhere, in any layout.

    The images' channels and the number of classes are those of the weights. Nothing is unpickled.

    Args:
        name: one of `senet.list_models()`, or a foreign network, see `open_source`; of that the
            weights must be its own state dict. A name with a tag (`se_resnet50.ra2_in1k`) says
            which released weights they are, whose preprocessing counts then.
        source: a file or `hf_hub:owner/name`, see `senet.weights.read_state_dict`; `pretrained`
            for the best released weights of the network, or those that the name says;
            `pretrained:TAG` for others.
        fresh_head: take weights without a last layer that fits, and give the network a fresh one
            for 1,000 classes.
        **options: of the network, see `create_model`.

    Raises:
        UserError: unknown name, weights that do not fit, or that say themselves which network they
            are for.
    """
    return _with_weights(name, *released_or_file(name, source), fresh_head, options)


def _with_weights(
    name: str,
    released: Released | None,
    source: str | PathLike[str],
    fresh_head: bool,
    options: dict[str, Any],
) -> Network:
    if released is not None:
        name, options = released.network, {**released.options, **options}
    contents = read_contents(local_file(source))
    if contents.description:
        raise UserError(f"{source} says itself which network it is for: leave out --model {name}")
    if is_foreign(name):
        return cast(Network, foreign_with_weights(name, contents.state, source))
    with torch.device("meta"):
        outline = build_model(name, **options)
    state = select(contents.state, outline).state
    decoded = detect(state).decode(state, outline)
    # Where these are not in the file, `load_weights` tells what is wrong with it.
    head = decoded.get(f"{outline.head}.weight")
    first = next(n for n, m in outline.named_modules() if isinstance(m, nn.Conv2d))
    stem = decoded.get(f"{first}.weight")
    model = build_model(
        name,
        num_classes=1000 if head is None else head.shape[0],
        in_channels=3 if stem is None else stem.shape[1],
        **options,
    )
    load_weights(model, contents.state, new_head=fresh_head and head is None)
    if released is not None:
        model.preprocessing = released.preprocessing_of(model.config["in_channels"])
    return model


def foreign_with_weights(
    name: str,
    state: Mapping[str, Tensor],
    source: str | PathLike[str],
    num_classes: int | None = None,
) -> nn.Module:
    """A foreign network with its own state dict.

    Args:
        name: as for `open_source`.
        state: the weights.
        source: where they come from, for messages.
        num_classes: classes of the network; by default those that the weights' classifier has.

    Raises:
        UserError: the weights do not fit, or as for `open_source`.
    """
    model = open_source(name, num_classes=num_classes)
    if num_classes is None and (found := _classes_of(state, model)):
        model = open_source(name, num_classes=found)
    remedy = "; is it the same network with as many classes?"
    load_own(model, state, f"weights {source} do not fit {name}", remedy)
    return model


def _classes_of(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """Classes of weights in which nothing but the classifier has another size than in a network."""
    own = model.state_dict()
    found = {
        len(tensor)
        for name, tensor in state.items()
        if name in own and tensor.ndim and tensor.shape != own[name].shape
        if tensor.shape[1:] == own[name].shape[1:]
    }
    return found.pop() if len(found) == 1 else None


def load_own(model: nn.Module, state: Mapping[str, Tensor], refusal: str, remedy: str = "") -> None:
    """Load a network's own state dict.

    Raises:
        UserError: names or shapes differ; `refusal`, the first of them, how many, and `remedy`.
    """
    own = model.state_dict()
    different = sorted(own.keys() ^ state.keys())
    different += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if different:
        raise UserError(f"{refusal}: {different[0]} differs ({len(different)} in all){remedy}")
    model.load_state_dict(state)


def open_weights(name: str, source: str | PathLike[str]) -> Checkpoint:
    """A network of a given name with weights from elsewhere, ready to classify.

    The preprocessing is what is known of released weights, or what the weights' layout implies.
    Classes of weights that are known to be ImageNet's have their names. Arguments as in
    `model_for_weights`.

    Raises:
        UserError: as there, weights without a last layer, or a layout that does not tell how images
            are prepared.
    """
    released, source = released_or_file(name, source)
    path = local_file(source)
    opened = _checkpoint(_with_weights(name, released, path, False, {}), {}, path)
    if released is None or released.classes != len(opened.classes):
        return opened
    return replace(opened, classes=imagenet_classes())
