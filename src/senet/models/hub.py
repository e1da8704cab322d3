"""Networks on the Hugging Face Hub, or in a folder of the same form.

A folder holds `model.safetensors`, whose metadata is enough to rebuild and use the network (the
same that training checkpoints carry), `config.json` for the Hub, and a model card, `README.md`.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin

from senet.errors import UserError
from senet.models.description import WEIGHTS, adopt, describe, pack_described, read_described
from senet.support.files import atomic_write
from senet.support.hub import fetch

HUB_CONFIG = "config.json"
_KINDS = {
    "classification": "An image classifier of {} classes",
    "multilabel": "A tagger of images with {} labels",
    "regression": "A network that reads {} numbers from an image,",
}
_OUTPUTS = {"classification": "Classes", "multilabel": "Labels", "regression": "Numbers"}


class HubMixin(PyTorchModelHubMixin):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for networks.

    Attributes:
        config: name, num_classes, in_channels and options of the network.
        preprocessing: how an image becomes its input, as plain values.
        classes: names in the order of the outputs; None if nobody gave them.
        task: what the outputs are, as plain values (see `senet.tasks`); None: logits of classes.
        metrics: what it was measured at, for the model card: `top1`, `top5`, `loss` ….
    """

    config: dict[str, Any]
    preprocessing: dict[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    metrics: dict[str, float] | None = None
    task: dict[str, Any] | None = None

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> "HubMixin":
        """A freshly initialised network of that configuration."""

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, torch.nn.Module)
        description = description_of(self)
        atomic_write(save_directory / WEIGHTS, pack_described(self.state_dict(), description))
        atomic_write(save_directory / HUB_CONFIG, json.dumps(description, indent=2, sort_keys=True))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str = "cpu",
        **from_config: Any,
    ) -> "HubMixin":
        path = Path(model_id) / WEIGHTS
        if not path.parent.is_dir():
            path = fetch(
                model_id,
                WEIGHTS,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        description, state = read_described(path, map_location)
        model = cls.from_config(description["model"])
        assert isinstance(model, torch.nn.Module)
        model.to(map_location)
        model.load_state_dict(state)
        adopt(model, description)
        model.eval()
        return model

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: what the network is, what it was measured at, how to use it.

        Args:
            *args: none are taken.
            **kwargs: `repository`: name on the Hub for the example; `text`: a paragraph to add.

        Raises:
            TypeError: any other argument.
        """
        unknown = [*args, *(kwargs.keys() - {"repository", "text"})]
        if unknown:
            raise TypeError(f"model cards take repository and text, got {unknown}")
        data = ModelCardData(
            library_name="senet",
            license="apache-2.0",
            pipeline_tag="image-classification",
            tags=["squeeze-and-excitation", "model_hub_mixin", "pytorch_model_hub_mixin"],
        )
        repository = kwargs.get("repository", "PATH-OR-OWNER/NAME")
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{_card_text(self, repository, kwargs)}")


def plain_values(preprocessing: object) -> dict[str, Any] | None:
    """Preprocessing as plain values, whether it is given as them, as an object, or not at all.

    Raises:
        UserError: it is something else, or holds something else.
    """
    if preprocessing is None:
        return None
    to_dict = getattr(preprocessing, "to_dict", None)
    values = to_dict() if to_dict is not None else preprocessing
    try:
        if isinstance(values, Mapping):
            json.dumps(values := dict(values))
            return values
    except TypeError:
        pass
    raise UserError(
        "preprocessing must be a senet.data.Preprocessing or its plain values (Preprocessing("
        f"…).to_dict()), got {preprocessing!r}"
    )


def _card_text(model: HubMixin, repository: str, extra: dict[str, Any]) -> str:
    assert isinstance(model, torch.nn.Module)
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = "classification" if model.task is None else str(model.task["name"])
    lines = [
        f"# {config['name']}",
        "",
        f"{_KINDS[kind].format(config['num_classes'])} with {parameters:,} parameters, "
        "from the networks of *Squeeze-and-Excitation Networks* "
        "([arXiv 1709.01507](https://arxiv.org/abs/1709.01507)).",
        "",
    ]
    if "text" in extra:
        lines += [str(extra["text"]), ""]
    if model.metrics:
        lines += ["| measure | value |", "|---|---|"]
        lines += [f"| {name} | {value:g} |" for name, value in model.metrics.items()]
        lines.append("")
    if config["options"]:
        lines += ["Options: " + ", ".join(f"{k} = {v}" for k, v in config["options"].items()), ""]
    if model.preprocessing:
        lines += ["Input: " + ", ".join(f"{k} {v}" for k, v in model.preprocessing.items()), ""]
    if model.classes:
        lines += [f"{_OUTPUTS[kind]}: {', '.join(model.classes)}", ""]
    lines += [
        "```python",
        "from senet.models import Network",
        "",
        f'model = Network.from_pretrained("{repository}")',
        "```",
        "",
    ]
    return "\n".join(lines)


def description_of(model: HubMixin) -> dict[str, Any]:
    """What the network itself knows, see `describe`.

    The options of the run that trained it are not in it: they hold paths of the user's machine.
    """
    return describe(
        model.config, model.preprocessing, model.classes, metrics=model.metrics, task=model.task
    )
