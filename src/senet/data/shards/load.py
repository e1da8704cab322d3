"""What `shards:PLACE` means: shards of `senet shard`, or tars that others made."""

from pathlib import Path

from senet.data.image_data import ImageData, Reading, natural_preprocessing, preprocessing_for
from senet.data.probe import Kind
from senet.data.shards.index import INDEX, PLAN
from senet.data.shards.read import PREFIX, SHUFFLE_BUFFER, BadShards, open_shards, shard_names
from senet.data.shards.tars import find_tars, load_tars
from senet.data.splits import split_of
from senet.errors import UserError


def load_shards(
    data: str,
    reading: Reading,
    *,
    cache: Path,
    buffer: int | None = None,
    bad: BadShards | None = None,
) -> ImageData:
    """`senet.data.load_data` for shards:PLACE.

    Args:
        data: with the prefix; a folder or http(s) address with an index, or a folder of tars
            without one; or such a place and the name of a tar, with a range in braces for some.
        reading: how they are read.
        cache: folder for fetched shards.
        buffer: images within which an epoch is shuffled; None: 10,000.
        bad: as for `open_shards`.

    Raises:
        UserError: no shards there, a broken one, or options that an index leaves no choice of.
    """
    spec = data.removeprefix(PREFIX)
    base, _, last = spec.rpartition("/")
    folder, pattern = (Path(base or "."), last) if last.endswith(".tar") else (Path(spec), None)
    ours = any((folder / name).exists() for name in (INDEX, PLAN))  # the plan: not yet whole
    if not ours and not spec.startswith(("http://", "https://")):
        tars = find_tars(folder) if folder.is_dir() else {}
        if pattern is not None:
            wanted = set(shard_names(pattern, spec))
            tars = {n: [p for p in part if p.name in wanted or split_of(n) != "train"]
                    for n, part in tars.items()}  # fmt: skip
            missing = wanted - {path.name for part in tars.values() for path in part}
            if missing:
                raise UserError(f"data {spec}: there is no {min(missing)} in {folder}")
        if any(tars.values()):
            return load_tars(
                data,
                folder,
                tars,
                reading,
                buffer=SHUFFLE_BUFFER if buffer is None else buffer,
                skip_bad=bad == "skip",
            )
        if any(folder.glob("*.tar.*")) or any(folder.glob("*.tgz")):
            raise UserError(f"{data}: images are read at their place in a tar: decompress the tars")
    for name in ("val_fraction", "image_column", "label_column", "split"):
        if (value := getattr(reading, name)) is not None:
            raise UserError(f"{name} is not for {data}: leave it out (got {value})")
    index, train, val, skipped, skipped_val = open_shards(
        spec, cache=cache, buffer=buffer, bad=bad, decoder=reading.decode
    )
    preprocessing, size = index.preprocessing, reading.image_size
    if size is not None and size != preprocessing.image_size:
        mean, std = preprocessing.mean, preprocessing.std
        preprocessing = preprocessing_for(size, mean, std, preprocessing.depth)
    channels, depth = reading.as_asked(Kind(preprocessing.channels, None, preprocessing.depth))
    for part in (train, val):
        part.channels, part.depth = channels, depth
    written = preprocessing.channels, preprocessing.depth
    if (channels, depth) != written and not ({channels, written[0]} == {1, 3} and depth == "8"):
        preprocessing = natural_preprocessing(preprocessing.image_size, channels, depth)
    return ImageData(
        data, train, val, index.classes, preprocessing, skipped, skipped_val=skipped_val
    )
