"""`senet evaluate`: the accuracy of a checkpoint."""

from pathlib import Path
from typing import Literal

from senet.cli.options import (
    NO_DATA,
    Config,
    DataFlags,
    Device,
    Switch,
    Whole,
    given,
    prepare_process,
)
from senet.support.progress import watch


def evaluate(
    checkpoint: Path,
    /,
    *,
    model: str | None = None,
    data: str | None = None,
    data_flags: DataFlags = NO_DATA,
    split: Literal["train", "val", "test"] | None = None,
    batch_size: Whole = 256,
    workers: Whole = 0,
    device: Device = "auto",
    json: Switch = False,
    figures: Path | None = None,
    no_tune_allocator: Switch = False,
    config: Config = None,
) -> None:
    """Measure top-1 and top-5 accuracy and loss of a checkpoint on validation images.

    Images are prepared as the checkpoint says, or as the layout of the weights implies;
    --image-size changes only their size.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, model.safetensors, folder
            of save_pretrained, hf_hub:owner/name; with --model, weights of any released layout.
        model: network that the weights are for, where they do not say it (.pth, timm's, …).
        data: what senet train takes, or a folder or FILE.csv without splits, of which all images
            count (default: what the checkpoint was trained on).
        split: which images: train, val or test (default: val, or test where there is no val).
        batch_size: images at a time.
        workers: processes that read images (0: this one).
        device: where the network runs.
        json: print JSON instead of a table.
        figures: folder for the confusion matrix as PNG and SVG.
        no_tune_allocator: leave glibc's memory allocator as it is (slower on Linux CPUs).
    """
    prepare_process(tune_allocator=not no_tune_allocator)
    from senet.commands.evaluate import evaluate_path, print_evaluation

    with watch() as progress:
        result = evaluate_path(
            checkpoint,
            data,
            given(data_flags),
            model_name=model,
            split=split,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=progress,
        )
    print_evaluation(result, as_json=json, figures=figures)
