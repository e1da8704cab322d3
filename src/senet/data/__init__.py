"""Data sets, preprocessing, augmentation and loaders.

`load_data` opens a data set, `train_loader` and `val_loader` make its batches; `load_image` reads
one image of any kind, and `Preprocessing.transform` makes it the network's input.
"""

from typing import TYPE_CHECKING

from senet.support import lazy

if TYPE_CHECKING:
    from senet.data.arrays import Depth as Depth
    from senet.data.augmentation import Augmentation as Augmentation
    from senet.data.decoders import Decoder as Decoder
    from senet.data.decoders import check_decoder as check_decoder
    from senet.data.image_data import ImageData as ImageData
    from senet.data.image_data import ImageStream as ImageStream
    from senet.data.image_data import map_style as map_style
    from senet.data.images import BadImageError as BadImageError
    from senet.data.images import FileImages as FileImages
    from senet.data.images import ImageSource as ImageSource
    from senet.data.images import MemoryImages as MemoryImages
    from senet.data.images import load_image as load_image
    from senet.data.images import to_mode as to_mode
    from senet.data.load import DATA_SETS as DATA_SETS
    from senet.data.load import absolute_data as absolute_data
    from senet.data.load import load_data as load_data
    from senet.data.loaders import Batch as Batch
    from senet.data.loaders import TrainLoader as TrainLoader
    from senet.data.loaders import train_loader as train_loader
    from senet.data.loaders import val_loader as val_loader
    from senet.data.samplers import EpochBatchSampler as EpochBatchSampler
    from senet.data.samplers import Key as Key
    from senet.data.shards.read import BadShards as BadShards
    from senet.data.sources.files import CHECKED_LIMIT as CHECKED_LIMIT
    from senet.data.sources.files import MEMORY_LIMIT as MEMORY_LIMIT
    from senet.data.sources.stream import StreamedImages as StreamedImages
    from senet.data.splits import Split as Split
    from senet.data.transforms import Preprocessing as Preprocessing
    from senet.data.walk import image_files as image_files

# Where each name lives; imported on first use, so that recipes and flags need no PyTorch.
_HOMES = {
    "CHECKED_LIMIT": "sources.files",
    "DATA_SETS": "load",
    "MEMORY_LIMIT": "sources.files",
    "Augmentation": "augmentation",
    "BadImageError": "images",
    "BadShards": "shards.read",
    "Batch": "loaders",
    "Decoder": "decoders",
    "Depth": "arrays",
    "EpochBatchSampler": "samplers",
    "FileImages": "images",
    "ImageData": "image_data",
    "ImageSource": "images",
    "ImageStream": "image_data",
    "Key": "samplers",
    "MemoryImages": "images",
    "Preprocessing": "transforms",
    "Split": "splits",
    "StreamedImages": "sources.stream",
    "TrainLoader": "loaders",
    "absolute_data": "load",
    "check_decoder": "decoders",
    "image_files": "walk",
    "load_data": "load",
    "load_image": "images",
    "map_style": "image_data",
    "to_mode": "images",
    "train_loader": "loaders",
    "val_loader": "loaders",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    return lazy.attribute(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted(__all__)
