"""`senet fold`: constant gates vanish into the layers around them."""

from pathlib import Path

from senet.cli.options import NO_DATA, Config, DataFlags, Switch, Whole, given, prepare_process
from senet.support.progress import watch
from senet.support.text import print_table


def fold(
    checkpoint: Path,
    /,
    *,
    out: Path,
    data: str | None = None,
    data_flags: DataFlags = NO_DATA,
    tolerance: float = 0.01,
    max_drop: float = 0.1,
    whole_blocks: Switch = False,
    statistics: Path | None = None,
    batch_size: Whole = 256,
    workers: Whole = 0,
    device: str = "auto",
    no_tune_allocator: Switch = False,
    config: Config = None,
) -> None:
    """Fold the gates that hardly depend on the image, and measure accuracy, size and speed.

    Blocks are put back, the most harmful first, until no more than --max-drop is lost.

    Args:
        checkpoint: run folder (its best checkpoint), checkpoint folder, or model.safetensors.
        out: checkpoint folder to make; it must not exist.
        data: embedded, cifar10, cifar100, fashion-mnist, imagenet, places365, or a folder
            (default: what the checkpoint was trained on).
        tolerance: largest standard deviation over the images of a gate that is folded.
        max_drop: most top-1 accuracy that may be lost, in percentage points.
        whole_blocks: fold only blocks none of whose gates moves; a partly folded block is smaller
            but runs outside the fused operator.
        statistics: statistics.safetensors of `senet explain` (default: recorded anew).
        batch_size: images at a time.
        workers: processes that read images (0: this one).
        device: auto, cpu, cuda or mps.
        no_tune_allocator: leave glibc's memory allocator as it is (slower on Linux CPUs).
    """
    prepare_process(tune_allocator=not no_tune_allocator)
    from senet.commands.fold import fold_checkpoint

    with watch() as progress:
        result = fold_checkpoint(
            checkpoint,
            out,
            data,
            given(data_flags),
            tolerance=tolerance,
            max_drop=max_drop,
            partial=not whole_blocks,
            statistics=statistics,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=progress,
        )
    for table in result.report.tables():
        print_table(table)
    print(f"Judged on {result.images:,} images. Checkpoint: {result.folder}")
