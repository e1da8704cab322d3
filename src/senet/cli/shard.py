"""`senet shard`: a data set as tar shards."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from senet.cli.options import NO_DATA, DataFlags, Whole, given
from senet.errors import UserError
from senet.support.places import check_folder


def shard(
    source: Annotated[str, Parameter(name="--data")],
    out: Path,
    *,
    shard_size: str = "256MB",
    seed: Whole = 0,
    workers: Whole = 1,
    data_flags: DataFlags = NO_DATA,
) -> None:
    """Write a data set as tar shards (WebDataset's layout) with an index of checksums.

    `--data shards:OUT` trains on them. Called again after it was stopped, it goes on.

    Args:
        source: what `senet train --data` takes: a name or a folder.
        out: folder of the shards.
        shard_size: largest size of a shard, such as 256MB or 1GiB.
        seed: of the order in which the training images lie in the shards.
        workers: shards written at a time.
    """
    from senet.data.shards.index import Shard
    from senet.data.shards.write import size_in_bytes, write_shards
    from senet.training.data import open_named

    size = size_in_bytes(shard_size)
    if source.startswith("shards:"):
        raise UserError(f"{source} is shards already")
    check_folder(out, "OUT")
    data = open_named(source, given(data_flags))

    def tell(done: Shard, fresh: bool) -> None:
        made = f"{done.images:,} images, {done.bytes:,} bytes" if fresh else "kept"
        print(f"{done.name}: {made}", flush=True)

    result = write_shards(data, out, shard_size=size, seed=seed, workers=workers, progress=tell)
    shards = result.index.shards
    print(
        f"{sum(s.images for s in shards):,} images in {len(shards)} shards "
        f"({result.written} written now), {sum(s.bytes for s in shards):,} bytes: "
        f"senet train --data shards:{out}"
    )
    for line in data.skipped:
        print(f"left out: {line}")
