"""Starting from a checkpoint, and training its SE blocks, its classifier, or both."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet.anatomy import excitations
from senet.checkpoint.files import is_described, model_for_weights, open_checkpoint
from senet.data import ImageData, Preprocessing
from senet.data.image_data import IMAGENET_STD
from senet.data.labels import OUTPUTS
from senet.errors import UserError
from senet.models import Network
from senet.networks.anywhere import head_of, new_head
from senet.networks.stem import adapt_stem
from senet.nn.block import SqueezeExcitation
from senet.tasks.classification import Classification
from senet.tasks.kinds import AnyTask
from senet.tasks.regression import Regression
from senet.training.config import RunConfig, Trained
from senet.training.data import normalised


@dataclass(frozen=True)
class Start:
    """A network to start from.

    Attributes:
        model: the network with its weights.
        preprocessing: how an image becomes its input; None where the weights do not tell.
        classes: how many outputs it has.
        task: what they are.
    """

    model: Network
    preprocessing: Preprocessing | None
    classes: int
    task: AnyTask


def starting_checkpoint(config: RunConfig) -> Start:
    """The checkpoint `config.init`, or `config.model` with the weights in that file.

    Raises:
        UserError: it is another network than `config.model`, or has no SE blocks to train.
    """
    assert config.init is not None
    if is_described(config.init):
        opened = open_checkpoint(config.init)
        classes = opened.model.config["num_classes"]
        start = Start(opened.model, opened.preprocessing, classes, opened.task)
        name = start.model.config["name"]
        if name != config.model or config.model_options:
            raise UserError(
                f"init {config.init} holds {name} with options of its own: leave out model "
                f"({config.model}) and options of the network"
            )
    else:
        model = model_for_weights(
            config.model, config.init, fresh_head=True, **config.model_options
        )
        told = model.preprocessing
        images = None if told is None else Preprocessing.from_dict(told)
        classes = model.config["num_classes"]
        known = Classification(tuple(map(str, range(classes))))
        start = Start(model, images, classes, known)
    if config.train in ("se", "se+head") and not excitations(start.model):
        raise UserError(
            f"init {config.init} has no SE blocks to train: put some in with senet insert"
        )
    return start


def as_the_checkpoint_says(start: Start, data: ImageData, config: RunConfig) -> ImageData:
    """The data with their images prepared as the checkpoint's network knows them.

    Its side, resize, mean, deviation and order of colours hold, not those of the data set;
    `config.image_size`, and a `normalisation` that is not the recipe's own, go before them. Where
    the weights do not tell, the data set's hold. Of images of other channels or depth mean and
    deviation are the data's own.
    """
    preprocessing = start.preprocessing or normalised(data, "mean_std").preprocessing
    if is_for_others(start, data):
        preprocessing = _for_other_images(preprocessing, data)
    if config.image_size is not None:
        preprocessing = preprocessing.resized(config.image_size)
    return dataclasses.replace(data, preprocessing=preprocessing)


def is_for_others(start: Start, data: ImageData) -> bool:
    """Whether a checkpoint is known to prepare images of other channels or depth."""
    known, images = start.preprocessing, data.preprocessing
    return known is not None and (known.channels, known.depth) != (images.channels, images.depth)


def _for_other_images(known: Preprocessing, data: ImageData) -> Preprocessing:
    """A checkpoint's side and resize, with the statistics of images of other channels or depth.

    What the network gets is spread out as it was in its training, where that was not by 1.
    """
    own = normalised(data, "mean_std").preprocessing
    spread = 1.0
    if known.depth == "8":
        deviation = sum(IMAGENET_STD) / 3 * known.value_range
        spread = deviation / (sum(known.std) / known.channels)
    return dataclasses.replace(
        own,
        std=tuple(value / spread for value in own.std),
        image_size=known.image_size,
        resize=known.resize,
        interpolation=known.interpolation,
    )


def fit_stem(start: Start, data: ImageData) -> tuple[str, ...]:
    """Adapt a network to the channels of the data, in place; what was done, in words.

    Raises:
        UserError: its first convolution cannot be adapted.
    """
    given, channels = start.model.config["in_channels"], data.preprocessing.channels
    if given == channels:
        return ()
    name = adapt_stem(start.model, channels, given=given)
    how = "summed" if channels == 1 else f"repeated, times {given}/{channels}"
    return (f"weights of {name} for {given} channels are {how} for the {channels} of the images",)


def prepare_start(start: Start, data: ImageData, train: Trained) -> Network:
    """The checkpoint's network in training mode, with a fresh classifier for other outputs.

    Raises:
        UserError: other classes, labels or numbers where the classifier is not trained.
    """
    model, classes = start.model, len(data.classes)
    if _other_outputs(start, data):
        if train == "se":
            known, wanted = OUTPUTS[start.task.name], OUTPUTS[data.task]
            raise UserError(
                f"init knows {start.classes} {known}, {data.name} has {classes} "
                f"{wanted}: train the classifier too (se+head or all)"
            )
        new_head(model, classes)
    return model.train()


def _other_outputs(start: Start, data: ImageData) -> bool:
    return start.classes != len(data.classes) or start.task.name != data.task


def kept_scale(start: Start, task: AnyTask) -> AnyTask:
    """The task of the data, with the checkpoint's mean and deviation where its numbers go on."""
    before = start.task
    if not (isinstance(task, Regression) and isinstance(before, Regression)):
        return task
    if len(task.names) != len(before.names):
        return task
    return dataclasses.replace(task, mean=before.mean, std=before.std)


def new_parameters(start: Start, model: nn.Module, data: ImageData) -> frozenset[str]:
    """Names of the parameters that the weights to start from did not have.

    Those of a classifier for other classes, and of SE blocks as `senet.insert` puts them in: their
    last layer is zero, which no training leaves it.

    Args:
        start: what the network was made of.
        model: what `prepare_start` gave.
        data: what it was given.
    """
    new = [
        name
        for name, module in model.named_modules()
        if isinstance(module, SqueezeExcitation) and not module.fc2.weight.any()
    ]
    if _other_outputs(start, data):
        new.append(head_of(model)[0])
    prefixes = tuple(f"{name}." for name in new)
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(prefixes))


def freeze(model: nn.Module, train: Trained) -> list[nn.Module]:
    """Stop training all but the SE blocks, the head or both; nothing for "all".

    Returns:
        The batch norms whose statistics must stay: they belong into evaluation mode.
    """
    if train == "all":
        return []
    trained: dict[int, Tensor] = {}
    if train != "head":
        for block in excitations(model).values():
            trained |= {id(tensor): tensor for tensor in block.weights.values()}
    if train in ("se+head", "head"):
        trained |= {id(parameter): parameter for parameter in head_of(model)[1].parameters()}
    model.requires_grad_(False)
    for tensor in trained.values():
        tensor.requires_grad_(isinstance(tensor, nn.Parameter))
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and not any(id(t) in trained for t in (*module.parameters(), *module.buffers()))
    ]
