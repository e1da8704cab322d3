"""Starting from a checkpoint, and training its SE blocks, its classifier, or both."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet.anatomy import excitations
from senet.checkpoint.files import Checkpoint, open_checkpoint
from senet.data import ImageData
from senet.errors import UserError
from senet.models import Network
from senet.networks.anywhere import head_of, new_head
from senet.training.config import RunConfig, Trained


def starting_checkpoint(config: RunConfig) -> Checkpoint:
    """The checkpoint `config.init`.

    Raises:
        UserError: it is another network than `config.model`, or has no SE blocks to train.
    """
    assert config.init is not None
    start = open_checkpoint(config.init)
    name = start.model.config["name"]
    if name != config.model or config.model_options:
        raise UserError(
            f"init {config.init} holds {name} with options of its own: leave out model "
            f"({config.model}) and options of the network"
        )
    if config.train in ("se", "se+head") and not excitations(start.model):
        raise UserError(
            f"init {config.init} has no SE blocks to train: put some in with senet insert"
        )
    return start


def prepare_start(start: Checkpoint, data: ImageData, train: Trained) -> Network:
    """The checkpoint's network in training mode, with a fresh classifier for other classes.

    Raises:
        UserError: other channels, or other classes where the classifier is not trained.
    """
    model = start.model
    channels, classes = model.config["in_channels"], len(data.classes)
    if channels != data.preprocessing.channels:
        raise UserError(
            f"init takes images of {channels} channels, {data.name} has "
            f"{data.preprocessing.channels}: use data of the same kind"
        )
    if model.config["num_classes"] != classes:
        if train == "se":
            raise UserError(
                f"init knows {model.config['num_classes']} classes, {data.name} has {classes}: "
                "train the classifier too (se+head or all)"
            )
        new_head(model, classes)
    return model.train()


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
