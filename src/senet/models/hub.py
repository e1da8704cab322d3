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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from senet.errors import UserError
from senet.support.files import atomic_write
from senet.support.hub import fetch

FORMAT, VERSION = "senet", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class HubMixin(PyTorchModelHubMixin):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for networks.

    Attributes:
        config: name, num_classes, in_channels and options of the network.
        preprocessing: how an image becomes its input, as plain values.
        classes: names in the order of the logits; None if nobody gave them.
        metrics: what it was measured at, for the model card: `top1`, `top5`, `loss` ….
    """

    config: dict[str, Any]
    preprocessing: dict[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    metrics: dict[str, float] | None = None

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> "HubMixin":
        """A freshly initialised network of that configuration."""

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, torch.nn.Module)
        state = {key: v.detach().cpu().contiguous() for key, v in self.state_dict().items()}
        atomic_write(save_directory / WEIGHTS, save(state, metadata(self)))
        description = json.loads(metadata(self)[FORMAT])
        atomic_write(save_directory / CONFIG, json.dumps(description, indent=2, sort_keys=True))

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


def _card_text(model: HubMixin, repository: str, extra: dict[str, Any]) -> str:
    assert isinstance(model, torch.nn.Module)
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"# {config['name']}",
        "",
        f"An image classifier of {config['num_classes']} classes with {parameters:,} parameters, "
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
        lines += [f"Classes: {', '.join(model.classes)}", ""]
    lines += [
        "```python",
        "from senet.models import Network",
        "",
        f'model = Network.from_pretrained("{repository}")',
        "```",
        "",
    ]
    return "\n".join(lines)


def metadata(model: HubMixin) -> dict[str, str]:
    """What a safetensors file of the network carries: enough to rebuild and use it, as JSON.

    The options of the run that trained it are not in it: they hold paths of the user's machine.
    """
    return described(
        {
            "model": model.config,
            "preprocessing": model.preprocessing,
            "classes": list(model.classes or ()),
            "metrics": dict(model.metrics or {}),
            "run": {},
        }
    )


def described(description: Mapping[str, Any]) -> dict[str, str]:
    """A description of a network as the metadata of a safetensors file.

    Args:
        description: `model` (its config), `preprocessing` (plain values or None), `classes`
            (list), `metrics` and `run` (options of the run, or empty); others may be added.
    """
    assert {"model", "preprocessing", "classes", "metrics", "run"} <= description.keys()
    # One metadata key only: safetensors writes several in an arbitrary order.
    return {FORMAT: json.dumps({"version": VERSION, **description}, sort_keys=True)}


def read_described(
    path: Path, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the weights in a safetensors file that this package wrote.

    Raises:
        UserError: no safetensors file, one of others, or one of another version.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            held = file.metadata() or {}
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        remedy = "" if path.suffix == ".safetensors" else "; other weights need --model NAME"
        raise UserError(
            f"{path} is not a safetensors file, or is cut short: {error}{remedy}"
        ) from error
    if FORMAT not in held:
        raise UserError(
            f"{path} was not written by senet (no {FORMAT!r} metadata), so it does not say which "
            "network it is for; give its name: --model NAME, or in Python "
            "senet.create_model(NAME, pretrained=PATH)"
        )
    try:
        description = json.loads(held[FORMAT])
        version = description["version"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: its {FORMAT!r} metadata are damaged: {error}") from error
    if version != VERSION:
        raise UserError(
            f"{path} has format version {version}, this senet reads {VERSION}; update senet"
        )
    return description, weights


def adopt(model: torch.nn.Module, description: Mapping[str, Any]) -> None:
    """Set the attributes of `HubMixin` that a description tells."""
    about = {
        "preprocessing": description["preprocessing"],
        "classes": tuple(description["classes"]) or None,
        "metrics": description["metrics"] or None,
    }
    for name, value in about.items():
        setattr(model, name, value)
