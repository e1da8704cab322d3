"""The images that a run or a command names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from senet.data import ImageData, load_data
from senet.training.config import DATA, RunConfig


def open_named(data: str, options: Mapping[str, Any]) -> ImageData:
    """`senet.data.load_data` with its options named as the fields of `RunConfig` are.

    Raises:
        UserError: as for `load_data`.
    """
    renamed = {"root" if name == "data_root" else name: value for name, value in options.items()}
    return load_data(data, **renamed)


def open_run_data(config: RunConfig) -> ImageData:
    """The data of a run, prepared as its recipe says.

    Raises:
        UserError: as for `load_data`.
    """
    data = open_named(config.data, {name: getattr(config, name) for name in DATA})
    if config.recipe.normalisation == "mean":
        plain = dataclasses.replace(data.preprocessing, std=(1.0,) * data.preprocessing.channels)
        data = dataclasses.replace(data, preprocessing=plain)
    return data
