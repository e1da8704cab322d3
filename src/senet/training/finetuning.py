"""Starting from a checkpoint, and training its SE blocks, its classifier, or both."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet.anatomy import excitations
from senet.checkpoint.files import is_described, model_for_weights, open_checkpoint
from senet.data import ImageData, Preprocessing
from senet.data.labels import TaskName
from senet.errors import UserError
from senet.models import Network
from senet.networks.anywhere import head_of, new_head
from senet.nn.block import SqueezeExcitation
from senet.tasks.classification import Classification
from senet.tasks.kinds import AnyTask
from senet.tasks.regression import Regression
from senet.training.config import RunConfig, Trained


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
    the weights do not tell, the data set's hold.

    Raises:
        UserError: images of other channels.
    """
    channels = start.model.config["in_channels"]
    if channels != data.preprocessing.channels:
        raise UserError(
            f"init takes images of {channels} channels, {data.name} has "
            f"{data.preprocessing.channels}: use data of the same kind, or --channels {channels}"
        )
    preprocessing = start.preprocessing or data.preprocessing
    if config.image_size is not None:
        preprocessing = preprocessing.resized(config.image_size)
    return dataclasses.replace(data, preprocessing=preprocessing)


def prepare_start(start: Start, data: ImageData, train: Trained) -> Network:
    """The checkpoint's network in training mode, with a fresh classifier for other outputs.

    Raises:
        UserError: other classes, labels or numbers where the classifier is not trained.
    """
    model, classes = start.model, len(data.classes)
    if _other_outputs(start, data):
        if train == "se":
            known, wanted = start.task, _plural(data.task)
            raise UserError(
                f"init knows {start.classes} {_plural(known.name)}, {data.name} has {classes} "
                f"{wanted}: train the classifier too (se+head or all)"
            )
        new_head(model, classes)
    return model.train()


def _other_outputs(start: Start, data: ImageData) -> bool:
    return start.classes != len(data.classes) or start.task.name != data.task


def _plural(task: TaskName) -> str:
    return {"classification": "classes", "multilabel": "labels", "regression": "numbers"}[task]


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
