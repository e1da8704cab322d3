"""`senet export`: a trained network as a file for others."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from senet.training.checkpoint import Checkpoint


def export(
    checkpoint: Path,
    path: Path,
    /,
    *,
    format: Literal["timm"],
    model: str | None = None,
) -> None:
    """Write a trained network as a file for others.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, model.safetensors, folder
            of save_pretrained, hf_hub:owner/name; with --model, weights of any released layout.
        path: file to write; .safetensors or .pth for timm.
        format: timm: weights that timm loads with strict=True.
        model: network that the weights are for, where they do not say it (.pth, timm's, …).
    """
    from senet.training.checkpoint import open_checkpoint, open_weights

    opened = open_checkpoint(checkpoint) if model is None else open_weights(model, checkpoint)
    print(f"{path}: {WRITERS[format](opened, path)}")


def _write_timm(checkpoint: "Checkpoint", path: Path) -> str:
    from senet.weights import save_weights, timm_name

    network = checkpoint.model
    save_weights(network, path, layout="timm")
    config = network.config
    return (
        f"timm.create_model({timm_name(network)!r}, num_classes={config['num_classes']}, "
        f"in_chans={config['in_channels']}) loads it with strict=True"
    )


# By format: writes the file and says how to open it.
WRITERS: dict[str, Callable[["Checkpoint", Path], str]] = {"timm": _write_timm}
