"""Everything that determines a run, as an object and as the config.toml of its folder."""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from senet.data import BadShards, Decoder, Depth, absolute_data
from senet.data.labels import TaskName
from senet.errors import UserError
from senet.networks.anywhere import WITHOUT_SE, check_options, is_foreign
from senet.support.files import atomic_write
from senet.support.text import decoded, printable
from senet.training.recipe import Recipe
from senet.weights.released import is_pretrained

Device = Literal["auto", "cpu", "cuda", "mps"]
Trained = Literal["all", "se", "se+head", "head"]
Parallel = Literal["ddp", "fsdp"]
RUN_CONFIG = "config.toml"
AUTO = "auto"
# How data are read.
DATA = (
    "data_root",
    "download",
    "val_fraction",
    "image_size",
    "channels",
    "depth",
    "skip_bad_images",
    "image_column",
    "label_column",
    "label_separator",
    "task",
    "shuffle_buffer",
    "bad_shards",
    "decode",
    "epoch_size",
)
# Where and how fast a run happens, not what comes out of it (on CPU).
MACHINE = (
    "out",
    "data_root",
    "download",
    "num_workers",
    "checkpoint_steps",
    "device",
    "timeout",
    "parallel",
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: network, data, recipe, seed and place.

    Attributes:
        model: name of the network: one of `senet.list_models()`, `timm:NAME`, `torchvision:NAME`
            or `FILE.py:FUNCTION`. "auto" lets the size of the images choose.
        model_options: options of `senet.create_model` other than num_classes and in_channels,
            which the data give; of other networks `without_se`, see `open_source`.
        data: name of a data set, or a folder of images, see `senet.data.load_data`. A run keeps
            the absolute path, so that it is found from any working directory.
        data_root: folder that holds named data sets.
        download: fetch a named data set that is missing.
        val_fraction: share of the training images kept for validation, for data without any.
        image_size: height and width of the network's input, pixels; None: the data's own.
        channels: what the network takes; None: what the images are.
        depth: "8", "16" or "float", what images are decoded to; None: what they are.
        skip_bad_images: leave out images that cannot be read instead of stopping.
        image_column, label_column: of tables with several, see `senet.data.load_data`.
        label_separator, task: what a table's labels are, likewise; None: found.
        shuffle_buffer: of shards and streams, see `senet.data.load_data`.
        bad_shards: "fail" or "skip", likewise.
        decode: "pillow" (None) or "turbo", likewise.
        epoch_size: images of an epoch of a stream, likewise.
        recipe: how it is trained.
        seed: of the initial weights, the order of the images and their augmentation. The
            split by `val_fraction` does not depend on it, so that seeds can be compared.
        init: checkpoint to start from instead of fresh weights, as `open_checkpoint` takes it; with
            `model` weights of it, as `model_for_weights` does: `pretrained`, for instance.
            Images are prepared as it says, not as the data set does; `image_size` changes the side.
        train: with `init`, what is trained: "all", "se" (the SE blocks alone; everything else,
            batch-norm statistics included, stays as it is), "se+head" (and the classifier) or
            "head" (the classifier alone).
        accumulate: parts that the images of a step are taken in, one after the other, for
            batches that do not fit into memory. Each part has batch statistics of its own.
        sync_bn: batch norm over the images of all processes (of a part) instead of each
            process's own, see
            `senet.nn.sync_bn`.
        parallel: how several processes share the network: "ddp" (each holds all of it) or "fsdp"
            (each holds a part of its parameters, gradients, momentum and average, see
            `senet.training.fsdp`). Results differ in the last digits.
        out: the run folder; it must not exist.
        num_workers: processes that load images; 0: none beside the training process.
        checkpoint_steps: steps between checkpoints within an epoch; 0: after each epoch only.
        device: "auto" takes a GPU where there is one.
        timeout: seconds without any step after which the run counts as hung: every process writes
            the stacks of its threads into `logs/` and ends with exit code 1. None: no such limit,
            beside that of PyTorch's process group (30 minutes for gloo, 10 for NCCL).
        compile: train the network through torch.compile; it takes a minute or more to start.
        fuse: run the tails and SE blocks of a network of timm, torchvision or a file through the
            operator, see `senet.fuse`; ours call it themselves.

    Raises:
        UserError: a value outside its range.
    """

    model: str
    data: str
    recipe: Recipe
    out: Path
    model_options: Mapping[str, Any] = field(default_factory=dict)
    data_root: str = "data"
    download: bool = False
    val_fraction: float | None = None
    image_size: int | None = None
    channels: int | None = None
    depth: Depth | None = None
    skip_bad_images: bool = False
    image_column: str | None = None
    label_column: str | None = None
    label_separator: str | None = None
    task: TaskName | None = None
    shuffle_buffer: int | None = None
    bad_shards: BadShards | None = None
    decode: Decoder | None = None
    epoch_size: int | None = None
    init: str | None = None
    train: Trained = "all"
    seed: int = 0
    accumulate: int = 1
    sync_bn: bool = False
    parallel: Parallel = "ddp"
    num_workers: int = 0
    checkpoint_steps: int = 0
    device: Device = "auto"
    timeout: float | None = None
    compile: bool = False
    fuse: bool = True

    def __post_init__(self) -> None:
        for each in fields(self):  # a string from a file would count as true
            if each.type is bool and not isinstance(getattr(self, each.name), bool):
                value = getattr(self, each.name)
                raise UserError(f"{each.name} must be true or false, got {value!r}")
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "data_root", str(self.data_root))
        for name in ("model", "data", "data_root", "out", "init", "image_column", "label_column",
                     "label_separator"):  # fmt: skip
            holdable(name, str(getattr(self, name)))
        for name in ("seed", "num_workers", "checkpoint_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"{name} must be a whole number of at least 0, got {value!r}")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise UserError(
                f"accumulate must be a whole number of at least 1, got {self.accumulate!r}"
            )
        if self.parallel not in get_args(Parallel):
            raise UserError(
                f"parallel must be one of {', '.join(get_args(Parallel))}, got {self.parallel!r}"
            )
        if self.parallel == "fsdp" and self.compile:
            raise UserError("parallel 'fsdp' and compile do not go together: leave out one of them")
        if self.timeout is not None and not (
            isinstance(self.timeout, int | float) and 0 < self.timeout < 2**31
        ):
            raise UserError(f"timeout must be a number of seconds above 0, got {self.timeout!r}")
        if self.seed >= 2**32:
            raise UserError(f"seed must be below 2**32 (NumPy's limit), got {self.seed}")
        if self.init is not None:
            object.__setattr__(self, "init", str(self.init))
        if self.model == AUTO and self.init is not None:
            raise UserError(f"init {self.init} needs the name of its network: give model")
        if is_foreign(self.model):
            check_options(self.model, self.model_options)
        if not self.fuse and not is_foreign(self.model):
            raise UserError(
                f"fuse=False (--no-fuse) is for networks of timm, torchvision or a file: "
                f"{self.model} calls the operator itself"
            )
        if self.train not in get_args(Trained):
            raise UserError(
                f"train must be one of {', '.join(get_args(Trained))}, got {self.train!r}"
            )
        if self.train != "all" and self.init is None:
            raise UserError(f"train={self.train!r} needs a network to start from: give init")
        if self.device not in get_args(Device):
            choices = ", ".join(get_args(Device))
            raise UserError(f"device must be one of {choices}, got {self.device!r}")

    @property
    def label(self) -> str:
        """What the network is called in tables and figures: a file without its folder."""
        name = Path(self.model).name if ".py:" in self.model else self.model
        return f"{name} without SE" if self.model_options.get(WITHOUT_SE) else name

    def in_place(self) -> "RunConfig":
        """The same run with absolute paths of what it reads, for any working directory."""
        return replace(self, **placed({name: getattr(self, name) for name in _PLACES}))

    def to_dict(self) -> dict[str, Any]:
        """All fields as TOML and JSON can hold them; None is left out."""
        values: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None:
                continue
            if isinstance(value, Path):
                value = str(value)
            elif isinstance(value, Recipe):
                value = value.to_dict()
            elif isinstance(value, Mapping):
                value = {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
                value = {k: v for k, v in value.items() if v is not None}
            values[each.name] = value
        # TOML wants tables behind the plain values.
        return dict(sorted(values.items(), key=lambda item: isinstance(item[1], dict)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> "RunConfig":
        """The inverse of `to_dict`, with some fields changed.

        Raises:
            UserError: an unknown or missing field, or a value outside its range.
        """
        given = {**values, **changes}
        known = {f.name for f in fields(cls)}
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(f"unknown option {name!r} of a run{hint}")
        missing = [name for name in ("model", "data", "recipe", "out") if name not in given]
        if missing:
            raise UserError(f"a run needs {' and '.join(missing)}")
        if isinstance(given["recipe"], Mapping):
            given["recipe"] = Recipe.from_dict(given["recipe"])
        return cls(**given)

    def to_toml(self, path: str | PathLike[str]) -> None:
        head = "# Reruns exactly: senet train --config THIS_FILE --out NEW_FOLDER\n"
        atomic_write(path, head + tomli_w.dumps(self.to_dict()))

    @classmethod
    def from_toml(cls, path: str | PathLike[str], **changes: Any) -> "RunConfig":
        """Read a config.toml, with some fields changed (such as `out`).

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it is not TOML, or see `from_dict`.
        """
        try:
            values = tomllib.loads(decoded(Path(path).read_bytes()))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a TOML file: {error}") from error
        try:
            return cls.from_dict(values, **changes)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def result_options(self) -> dict[str, Any]:
        """The part of `to_dict` that the result depends on."""
        options = {key: value for key, value in self.to_dict().items() if key not in MACHINE}
        if not self.compile:  # checkpoints of runs from before this option lack it
            del options["compile"]
        if self.fuse:  # likewise
            del options["fuse"]
        return options


def placed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a run with absolute paths of what it reads, as `RunConfig.in_place` has them."""
    return {
        name: value if value is None or name not in _PLACES else _PLACES[name](str(value))
        for name, value in options.items()
    }


def _absolute_init(init: str) -> str:
    there = not is_pretrained(init) and Path(init).exists()
    return os.path.abspath(init) if there else init  # noqa: PTH100 - links stay links


def absolute_model(name: str) -> str:
    """The name of a network, from whatever working directory it is asked for."""
    return os.path.abspath(name) if ".py:" in name else name  # noqa: PTH100 - links stay links


_PLACES: Mapping[str, Callable[[str], str]] = {
    "model": absolute_model,
    "data": absolute_data,
    "data_root": os.path.abspath,
    "init": _absolute_init,
}


def holdable(name: str, text: str) -> str:
    """The text, if config.toml can hold it.

    Raises:
        UserError: it has bytes that are not UTF-8; `name` is the option it belongs to.
    """
    if printable(text) != text:
        raise UserError(
            f"{name} {printable(text)} has bytes that are not UTF-8, which config.toml "
            "cannot hold: rename it"
        )
    return text


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"recipe": {"lr": 1}} becomes {"recipe.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
