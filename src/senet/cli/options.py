"""Flags that several commands share, their types, and defaults from a TOML file."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, ArgumentCollection, Group, Parameter
from cyclopts.argument import update_argument_collection

from senet.cli.converters import names, whole, whole_numbers
from senet.cli.recipe_flags import OFF, flags_of_recipe
from senet.errors import UserError
from senet.support.text import decoded
from senet.support.trust import check_trusted

MODEL_GROUP = Group("Network", sort_key=1)
DATA_GROUP = Group("Data", sort_key=2)
RECIPE_GROUP = Group("Recipe", sort_key=3)
RUN_GROUP = Group("Run", sort_key=4)


Whole = Annotated[int, Parameter(converter=whole)]
OptionalWhole = Annotated[int | None, Parameter(converter=whole)]
WholeNumbers = Annotated[
    tuple[int, ...] | None, Parameter(converter=whole_numbers, n_tokens=1, negative="")
]
Names = Annotated[tuple[str, ...] | None, Parameter(converter=names, n_tokens=1, negative="")]
Device = Literal["auto", "cpu", "cuda", "mps"]
Decode = Literal["pillow", "turbo"] | None
Switch = Annotated[bool, Parameter(negative="", show_default=False)]
Config = Annotated[
    Path | None,
    Parameter(
        help="TOML file with defaults for these flags, such as `batch-size = 64`; flags win."
    ),
]


@Parameter(name="*", group=MODEL_GROUP)
@dataclass(frozen=True, kw_only=True)
class SEFlags:
    """How the SE blocks of a network look; only networks with SE take these."""

    reduction: float | None = None
    """Reduction ratio r: the hidden width is C/r rounded down (default: 16)."""
    squeeze: Literal["avg", "max", "none"] | None = None
    """Pooling of the squeeze (default: avg)."""
    gate: Literal["sigmoid", "tanh", "relu", "hard_sigmoid", "identity_sigmoid"] | None = None
    """Gate function; identity_sigmoid starts every gate at 1 (default: sigmoid)."""
    integration: Literal["standard", "pre", "post", "identity", "3x3"] | None = None
    """Where the block stands around the residual branch (default: standard)."""
    stages: WholeNumbers = None
    """Stages that get SE blocks, numbered as in the paper, such as 2,3,4 (default: all)."""
    bias: bool | None = None
    """Biases in the two fully connected layers (default: yes)."""
    divisor: OptionalWhole = None
    """Round the hidden width to a multiple of this, as timm does to 8 (default: 1)."""


@Parameter(name="*", group=MODEL_GROUP)
@dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """What some networks can be told, beside their SE blocks."""

    variant: Literal["torch", "caffe", "cadene"] | None = None
    """ImageNet ResNets: strides and pooling as in torchvision or as in the released Caffe networks;
    cadene is caffe with a further ReLU, for se_resnet18 and 34 (default: torch)."""
    dropout: float | None = None
    """senet154, inception_v3, inception_resnet_v2 and vgg16_bn: share of the features dropped
    before the classifier, in VGG in both hidden layers (default: 0.2, 0.5, 0.2 and 0.5)."""
    width: float | None = None
    """mobilenet: multiplies the channels of every layer (default: 1)."""
    aux: bool | None = None
    """inception_v3: build the auxiliary classifier, for weights that have one."""
    preactivation: bool | None = None
    """resnet110_cifar: batch norm and ReLU before each convolution."""
    without_se: Annotated[bool | None, Parameter(negative="")] = None
    """timm:NAME, torchvision:NAME and FILE.py:FUNCTION: take out the SE blocks of the network."""


@Parameter(name="*", group=DATA_GROUP)
@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Which images, and how they are read."""

    data_root: Path | None = None
    """Folder that holds the data sets fetched through torchvision (default: data)."""
    download: bool | None = None
    """Fetch a missing data set into --data-root."""
    val_fraction: float | None = None
    """Share of the images held out for validation, for data without a split of their own."""
    image_size: OptionalWhole = None
    """Side of the network's input in pixels (default: that of the data set)."""
    channels: OptionalWhole = None
    """Channels of the network's input, such as 3 for grey images and a network for colours, or 4
    for RGBA whose fourth is no transparency (default: those of the images)."""
    depth: Literal["8", "16", "float"] | None = None
    """Bits of a pixel; 8 reads 16-bit images as 8-bit (default: those of the images)."""
    image_column: str | None = None
    """Column of the images, where a table has several (of WebDataset's tars: their ending)."""
    label_column: str | None = None
    """Column of the classes, where a table has several (of tars: an ending or entry of .json);
    several as a,b,c: labels that an image has (1) or not (0), or numbers."""
    label_separator: str | None = None
    """Between several labels in a cell, such as ";" (default: ; or |, where labels separated by
    it occur on their own too)."""
    task: Literal["classification", "multilabel", "regression"] | None = None
    """Tables: one class an image, any number of labels, or numbers (default: what the columns hold;
    what is not simply classes is told)."""
    skip_bad_images: bool | None = None
    """Leave out images that cannot be read and count them, instead of stopping."""
    shuffle_buffer: OptionalWhole = None
    """Images within which the order of an epoch is shuffled, of shards (default: 10000) or a stream
    (default: 1000, held in memory as files)."""
    epoch_size: OptionalWhole = None
    """hf-stream: images of an epoch (default: all, where the data set says how many)."""
    bad_shards: Literal["fail", "skip"] | None = None
    """shards: stop at a broken one, or read all before the start and leave out the broken ones
    (default: fail)."""
    decode: Decode = None
    """Who decodes JPEG: pillow, or turbo (the libjpeg-turbo in torchvision, for a Pillow without
    one); Pillow decodes all else (default: pillow)."""


_RECIPE_FLAGS: Any = flags_of_recipe(RECIPE_GROUP)


@Parameter(name="*")
class RecipeFlags(_RECIPE_FLAGS):
    """What changes in the recipe; a file given by --config may hold a whole [recipe]."""

    def changes(self) -> dict[str, Any]:
        """The fields of `Recipe` and of its augmentation that were given."""
        return {name: None if value is OFF else value for name, value in given(self).items()}


@Parameter(name="*", group=RUN_GROUP)
@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """Where and how a run is carried out; only --compile and --fuse change its result."""

    workers: Annotated[OptionalWhole, Parameter(name=("--workers", "--num-workers"))] = None
    """Processes that load images (default: 0, the training process itself)."""
    checkpoint_steps: OptionalWhole = None
    """Steps between checkpoints within an epoch (default: 0, after each epoch only)."""
    device: Device | None = None
    """Where the network runs (default: auto)."""
    timeout: float | None = None
    """Seconds without a step after which every process writes its stacks to logs/ and ends with
    exit code 1 (default: none)."""
    compile: bool | None = None
    """Train through torch.compile, which takes a minute or more to start (default: no)."""
    fuse: bool | None = None
    """Of a network of timm, torchvision or a file: run its tails and SE blocks through the operator
    (default: yes)."""

    def run_fields(self) -> dict[str, Any]:
        """The flags that were given, under the names of `RunConfig`'s fields."""
        names = {"workers": "num_workers"}
        return {names.get(name, name): value for name, value in given(self).items()}


@Parameter(name="*", group=RECIPE_GROUP)
@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """How the images of a step are shared out, among processes and in time."""

    accumulate: OptionalWhole = None
    """Parts that a process takes its images of a step in, to save memory (default: 1)."""
    sync_bn: bool | None = None
    """Batch norm over the images of all processes instead of each process's own."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """What each of several processes holds of the network: all of it (ddp), or a part of its
    parameters, gradients and momentum (fsdp, for networks that do not fit) (default: ddp)."""


NO_SE = SEFlags()
NO_NETWORK = NetworkFlags()
NO_DATA = DataFlags()
NO_STEP = StepFlags()
NO_RECIPE = RecipeFlags()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProcessFlags:
    """What every command that runs a network takes."""

    no_tune_allocator: Annotated[Switch, Parameter(group=RUN_GROUP)] = False
    """Leave glibc's memory allocator as it is (slower on Linux CPUs)."""
    config: Annotated[Config, Parameter(group=RUN_GROUP)] = None

    def prepare_process(self) -> None:
        prepare_process(tune_allocator=not self.no_tune_allocator)


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(ProcessFlags):
    """What every training takes, of one network or of several."""

    se: SEFlags = NO_SE
    network: NetworkFlags = NO_NETWORK
    data: str | None = None
    """embedded, cifar10, cifar100, fashion-mnist, imagenet, places365, a folder of images with
    train/ and val/, FILE.csv or FILE.parquet of files and labels, shards:PLACE (of `senet shard`, a
    folder or an address; or a folder of WebDataset's tars), hf:NAME (Hugging Face's datasets; a
    name or a local folder) or hf-stream:NAME (the same, streaming) (default: embedded)."""
    data_flags: DataFlags = NO_DATA
    recipe: Annotated[str | None, Parameter(group=RECIPE_GROUP)] = None
    """quick, finetune, cifar, imagenet-paper or imagenet-modern, which `senet recipes` shows
    (default: quick; of senet train with --init: finetune)."""
    recipe_flags: RecipeFlags = NO_RECIPE
    machine: MachineFlags = MachineFlags()


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags(ProcessFlags):
    """How the validation images of a checkpoint are gone through."""

    data: str | None = None
    """What senet train takes, or a folder or table without splits, of which all images count
    (default: what the checkpoint was trained on)."""
    data_flags: DataFlags = NO_DATA
    batch_size: Whole = 256
    """Images at a time."""
    workers: Whole = 0
    """Processes that read images (0: this one)."""
    device: Device = "auto"
    """Where the network runs."""

    def arguments(self) -> dict[str, Any]:
        """Of the functions that go through the images."""
        return {
            "data_name": self.data,
            "data_options": given(self.data_flags),
            "batch_size": self.batch_size,
            "workers": self.workers,
            "device": self.device,
        }


NO_TRAINING = TrainingFlags()
NO_EVALUATION = EvaluationFlags()


def given(flags: Any) -> dict[str, Any]:
    """The flags of a group that were given, by name."""
    return {name: value for name, value in vars(flags).items() if value is not None}


def named(**flags: Any) -> dict[str, Any]:
    """The flags that were given, by name, for flags that stand alone."""
    return {name: value for name, value in flags.items() if value is not None}


def apply_config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Let a file given by --config stand in for the flags that were not given.

    Raises:
        UserError: the file is missing or is no TOML, or names a file with code that this user never
            named.
        cyclopts.CycloptsError: unknown key, or a value of another type.
    """
    for argument in arguments:
        if argument.name == "--config" and argument.tokens:
            path = Path(argument.tokens[0].value)
            settings = read_toml(path)
            if commands == ("train",):
                settings = flags_of_run(settings)
            update_argument_collection(
                settings,
                str(path),
                arguments,
                app.app_stack.stack[-1],
                root_keys=(),
                allow_unknown=False,
            )
            for token in (token for each in arguments for token in each.tokens):
                if token.source == str(path):  # not what was given beside the file
                    check_trusted(token.value, named_by=f"--config {path}")
            return


def flags_of_run(settings: dict[str, Any]) -> dict[str, Any]:
    """The config.toml of a training run as flags: its tables flattened.

    The table [recipe] is left out: it holds more than there are flags for, and `senet train`
    reads it itself.
    """
    flat = dict(settings)
    if isinstance(flat.get("recipe"), dict):
        del flat["recipe"]
    options = flat.pop("model_options", {})
    if not isinstance(options, dict):
        raise UserError(f"[model_options] must be a table, got {options!r}")
    return flat | options


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        UserError: the file is missing, unreadable or no TOML.
    """
    try:
        return tomllib.loads(decoded(path.read_bytes()))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a TOML file ({error})") from error


def config_place(tokens: Sequence[str], text: str) -> str:
    """Where the key that an error names stands in the file of --config: "FILE, line N: ", or "".

    Args:
        tokens: command and flags.
        text: the error; names the key as [key] or 'key', or begins with it.
    """
    for token, value in zip(tokens, [*tokens[1:], ""], strict=True):
        if token == "--config" or token.startswith("--config="):
            path = Path(token.partition("=")[2] or value)
            break
    else:
        return ""
    if not path.is_file():
        return ""
    named = re.split("did you mean", text, flags=re.IGNORECASE)[0]
    try:
        lines = decoded(path.read_bytes()).splitlines()
    except UnicodeDecodeError:
        return ""
    flags = {token[2:].partition("=")[0].replace("-", "_") for token in tokens if token[:2] == "--"}
    for number, line in enumerate(lines):
        assignment = re.match(r"\s*(?:[\w-]+\.)*([\w-]+)\s*=", line)
        if assignment is None or assignment[1].replace("-", "_") in flags:  # flags win
            continue
        key = "[-_]".join(re.escape(part) for part in re.split("[-_]", assignment[1]))
        if re.search(rf"\[{key}\]|'{key}'|^{key}\b", named):
            return f"{path}, line {number + 1}: "
    return ""


def prepare_process(*, tune_allocator: bool) -> None:
    """Settings for the whole process that must come before PyTorch allocates anything."""
    if tune_allocator:
        from senet.support.allocator import tune_allocator as tune

        tune()


def given_network(
    checkpoint: Path | None, model: str | None, weights: Path | None
) -> tuple[Path | None, str | None]:
    """The file and the network's name of a command that takes a checkpoint, --model, --weights.

    Args:
        checkpoint: what was given without a flag.
        model: name of a network, or, where no file is given, a checkpoint itself.
        weights: the same as `checkpoint`.

    Returns:
        The checkpoint and None; the weights and the name of their network; or None, for fresh
        weights, and the name.

    Raises:
        UserError: nothing, two files, or a name for what says it itself.
    """
    if checkpoint is not None and weights is not None:
        raise UserError(f"give {checkpoint} or --weights {weights}, not both")
    path = weights if checkpoint is None else checkpoint
    if path is not None and path.is_dir() and model is not None:
        raise UserError(f"{path} says itself which network it is for: leave out --model {model}")
    if path is None and model is None:
        raise UserError("give a checkpoint, or --model and perhaps --weights")
    if path is None and model is not None and is_place(model):
        return Path(model), None
    return path, model


def trained_network(
    checkpoint: Path | None, model: str | None, weights: Path | None
) -> tuple[Path, str | None]:
    """As `given_network`, of a command for which fresh weights are of no use.

    Raises:
        UserError: as there, or a name alone.
    """
    path, name = given_network(checkpoint, model, weights)
    if path is None:
        raise UserError(
            f"--model {name} has no weights: give --weights FILE, or --weights pretrained for "
            "released ones"
        )
    return path, name


def is_place(model: str) -> bool:
    """Whether what --model says is a checkpoint, and not the name of a network.

    A folder that happens to be called as a network of ours is one only if it holds a checkpoint.
    """
    if model.startswith("hf_hub:"):
        return True
    path = Path(model)
    if not path.is_dir() or path.parent != Path():
        return path.exists()
    from senet.checkpoint.write import MANIFEST
    from senet.models import list_models
    from senet.models.description import WEIGHTS

    held = any((path / name).exists() for name in ("checkpoints", MANIFEST, WEIGHTS))
    return held or model not in list_models()
