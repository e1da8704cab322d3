"""The images that a run or a command names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from senet.data import ImageData, load_data
from senet.data.statistics import measure
from senet.training.config import DATA, RunConfig
from senet.training.recipe import Normalisation


def open_named(data: str, options: Mapping[str, Any]) -> ImageData:
    """`senet.data.load_data` with its options named as the fields of `RunConfig` are.

    Raises:
        UserError: as for `load_data`.
    """
    renamed = {"root" if name == "data_root" else name: value for name, value in options.items()}
    return load_data(data, **renamed)


def open_run_data(config: RunConfig, *, channels: int | None = None) -> ImageData:
    """The data of a run, prepared as its recipe says.

    Args:
        config: of the run.
        channels: what the network takes, where the configuration leaves it open.

    Raises:
        UserError: as for `load_data`.
    """
    options = {name: getattr(config, name) for name in DATA}
    options["channels"] = config.channels or channels
    return normalised(open_named(config.data, options), config.recipe.normalisation)


def normalised(data: ImageData, how: Normalisation) -> ImageData:
    """The data with their images normalised as a recipe says.

    Raises:
        UserError: "measured" on a stream.
    """
    if how == "mean":
        return without_deviation(data)
    if how == "measured":
        found, images = measure(data), data.preprocessing
        order = -1 if images.channel_order == "bgr" else 1
        mean, std = (
            tuple(images.value_range * value for value in values[::order])
            for values in (found.mean, found.std)
        )
        return dataclasses.replace(
            data, preprocessing=dataclasses.replace(images, mean=mean, std=std)
        )
    return data


def without_deviation(data: ImageData) -> ImageData:
    """The data with their mean taken off and not divided by the deviation."""
    plain = dataclasses.replace(data.preprocessing, std=(1.0,) * data.preprocessing.channels)
    return dataclasses.replace(data, preprocessing=plain)
