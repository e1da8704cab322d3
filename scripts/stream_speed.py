"""How fast a stream is read without decoding: what passing over a part of an epoch costs.

python scripts/stream_speed.py    # 8,192 images in four Parquet files in a temporary folder
"""

import tempfile
import time
import warnings
from pathlib import Path

import datasets

from senet.bench.data import write_pictures
from senet.data import load_data
from senet.data.sources.stream import StreamedImages

IMAGES, FILES, PICTURES, PASSES = 8192, 4, 64, 5
SEEDS: dict[str, int | None] = {"shuffled": 1, "in order": None}


def main() -> None:
    """Write the files, read them in both orders in turns, print images a second."""
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # not a part of the reading
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    with tempfile.TemporaryDirectory() as folder:
        pictures = [Path(path).read_bytes() for path in write_pictures(Path(folder), PICTURES)]

        def write(name: str, count: int) -> None:
            images = [{"bytes": pictures[i % PICTURES], "path": None} for i in range(count)]
            columns = {"image": images, "label": [i % 2 for i in range(count)]}
            rows = datasets.Dataset.from_dict(columns, features=features)
            rows.to_parquet(str(Path(folder) / name))

        for file in range(FILES):
            write(f"train-{file:05d}-of-{FILES:05d}.parquet", IMAGES // FILES)
        write("validation-00000-of-00001.parquet", 1)
        for picture in Path(folder).glob("*.jpg"):
            picture.unlink()
        train = load_data(f"hf-stream:{folder}", epoch_size=IMAGES).train
        assert isinstance(train, StreamedImages)
        for number in range(PASSES):
            for order, seed in SEEDS.items():
                began = time.perf_counter()
                count = sum(1 for _ in train.rows(seed=seed, epoch=number))
                print(f"{order}: {count / (time.perf_counter() - began):.0f} images/s")


if __name__ == "__main__":
    main()
