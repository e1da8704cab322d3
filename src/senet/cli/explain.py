"""`senet explain`: what the gates of a checkpoint learned."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from senet.cli.options import NO_DATA, Config, DataFlags, Switch, Whole, given, prepare_process
from senet.support.progress import watch
from senet.support.text import print_table

Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


def explain(
    checkpoint: Path,
    /,
    *,
    data: str | None = None,
    data_flags: DataFlags = NO_DATA,
    out: Path | None = None,
    classes: Names = (),
    images: Whole = 400,
    batch_size: Whole = 256,
    workers: Whole = 0,
    device: str = "auto",
    no_tune_allocator: Switch = False,
    config: Config = None,
) -> None:
    """Record every gate over validation images and report what the SE blocks learned.

    Writes report.html (one file, opens without a network), the figures 6 and 7 of the paper as
    PNG and SVG, gates.csv, gates_by_class.csv, and statistics.safetensors for `senet fold`.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, or model.safetensors.
        data: embedded, cifar10, cifar100, fashion-mnist, imagenet, places365, or a folder
            (default: what the checkpoint was trained on).
        out: folder to make (default: gates inside the run folder); it must not exist.
        classes: names of the classes to draw (default: evenly chosen).
        images: most images in the report.
        batch_size: images at a time.
        workers: processes that read images (0: this one).
        device: auto, cpu, cuda or mps.
        no_tune_allocator: leave glibc's memory allocator as it is (slower on Linux CPUs).
    """
    prepare_process(tune_allocator=not no_tune_allocator)
    from senet.commands.explain import explain as explain_checkpoint

    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    with watch() as progress:
        result = explain_checkpoint(
            checkpoint,
            folder / "gates" if out is None else out,
            data,
            given(data_flags),
            classes=classes,
            images=images,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=progress,
        )
    print_table(result.table())
    print(f"Figures, tables and report.html: {result.folder}")
