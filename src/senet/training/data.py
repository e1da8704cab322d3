"""The images that a run or a command names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from senet.data import ImageData, load_data
from senet.data.image_data import is_unmeasured
from senet.data.statistics import Statistics, measure, measure_first
from senet.training.config import DATA, RunConfig
from senet.training.recipe import Normalisation

MEASURED = 1000
"""Training images that mean and deviation are measured on, unless a recipe asks for it."""


def open_named(data: str, options: Mapping[str, Any]) -> ImageData:
    """`senet.data.load_data` with its options named as the fields of `RunConfig` are.

    Raises:
        UserError: as for `load_data`.
    """
    renamed = {"root" if name == "data_root" else name: value for name, value in options.items()}
    return load_data(data, **renamed)


def open_run_data(config: RunConfig, *, colours: bool = False) -> ImageData:
    """The data of a run, their mean and deviation as the data set has them.

    Args:
        config: of the run.
        colours: the network is for colours: grey images are read as such.

    Raises:
        UserError: as for `load_data`.
    """
    options = {name: getattr(config, name) for name in DATA}
    return open_named(config.data, options | {"colours": colours})


def normalised(data: ImageData, how: Normalisation) -> ImageData:
    """The data with their images normalised as a recipe says.

    Where the data set has no mean and deviation (`is_unmeasured`), they are measured, on up to
    `MEASURED` of the training images.

    Raises:
        UserError: "measured" on a stream.
    """
    if is_unmeasured(data.preprocessing):
        data = with_statistics(data, measure_first(data, MEASURED))
        return without_deviation(data) if how == "mean" else data
    if how == "mean":
        return without_deviation(data)
    return with_statistics(data, measure(data)) if how == "measured" else data


def with_statistics(data: ImageData, found: Statistics) -> ImageData:
    """The data with what was measured as their mean and deviation."""
    images = data.preprocessing
    order = -1 if images.channel_order == "bgr" else 1
    mean, std = (
        tuple(images.value_range * value for value in values[::order])
        for values in (found.mean, found.std)
    )
    return dataclasses.replace(data, preprocessing=dataclasses.replace(images, mean=mean, std=std))


def without_deviation(data: ImageData) -> ImageData:
    """The data with their mean taken off and not divided by the deviation."""
    plain = dataclasses.replace(data.preprocessing, std=(1.0,) * data.preprocessing.channels)
    return dataclasses.replace(data, preprocessing=plain)
