"""Data sets, preprocessing, augmentation and loaders.

`load_data` opens a data set, `train_loader` and `val_loader` make its batches; `load_image` reads
one image of any kind, and `Preprocessing.transform` makes it the network's input.
"""

from senet.data.images import (
    BadImageError,
    FileImages,
    ImageSource,
    MemoryImages,
    load_image,
    to_mode,
)
from senet.data.loaders import (
    Batch,
    EpochBatchSampler,
    Key,
    TrainLoader,
    train_loader,
    val_loader,
)
from senet.data.shards import BadShards
from senet.data.sources import (
    CHECKED_LIMIT,
    DATA_SETS,
    MEMORY_LIMIT,
    ImageData,
    load_data,
)
from senet.data.transforms import Augmentation, Preprocessing

__all__ = [
    "CHECKED_LIMIT",
    "DATA_SETS",
    "MEMORY_LIMIT",
    "Augmentation",
    "BadImageError",
    "BadShards",
    "Batch",
    "EpochBatchSampler",
    "FileImages",
    "ImageData",
    "ImageSource",
    "Key",
    "MemoryImages",
    "Preprocessing",
    "TrainLoader",
    "load_data",
    "load_image",
    "to_mode",
    "train_loader",
    "val_loader",
]
