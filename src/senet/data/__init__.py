"""Data sets, preprocessing, augmentation and loaders.

`load_data` opens a data set, `train_loader` and `val_loader` make its batches; `load_image` reads
one image of any kind, and `Preprocessing.transform` makes it the network's input.
"""

from senet.data.decoders import Decoder, check_decoder
from senet.data.image_data import ImageData, ImageStream, map_style
from senet.data.images import (
    BadImageError,
    FileImages,
    ImageSource,
    MemoryImages,
    load_image,
    to_mode,
)
from senet.data.load import DATA_SETS, absolute_data, load_data
from senet.data.loaders import Batch, TrainLoader, train_loader, val_loader
from senet.data.samplers import EpochBatchSampler, Key
from senet.data.shards.read import BadShards
from senet.data.sources.files import CHECKED_LIMIT, MEMORY_LIMIT
from senet.data.sources.stream import StreamedImages
from senet.data.splits import Split
from senet.data.transforms import Augmentation, Preprocessing
from senet.data.walk import image_files

__all__ = [
    "CHECKED_LIMIT",
    "DATA_SETS",
    "MEMORY_LIMIT",
    "Augmentation",
    "BadImageError",
    "BadShards",
    "Batch",
    "Decoder",
    "EpochBatchSampler",
    "FileImages",
    "ImageData",
    "ImageSource",
    "ImageStream",
    "Key",
    "MemoryImages",
    "Preprocessing",
    "Split",
    "StreamedImages",
    "TrainLoader",
    "absolute_data",
    "check_decoder",
    "image_files",
    "load_data",
    "load_image",
    "map_style",
    "to_mode",
    "train_loader",
    "val_loader",
]
