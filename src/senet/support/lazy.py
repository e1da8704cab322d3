"""Public names of a package that are imported on first use, so that the package itself is light."""

import importlib
from collections.abc import Mapping

from senet.support import extras


def attribute(package: str, homes: Mapping[str, str], name: str) -> object:
    """What `package.name` is: for a package's `__getattr__`.

    Args:
        package: dotted name of the package.
        homes: the module of each public name, relative to the package; a module of the name itself
            is what is meant.
        name: what is asked for.

    Raises:
        AttributeError: there is no such name.
        ModuleNotFoundError: it needs an extra of the package; the message says which.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{package}.{homes[name]}")
    except ModuleNotFoundError as error:
        if (remedy := extras.remedy(error)) is None:
            raise
        raise ModuleNotFoundError(f"{package}.{name}: {remedy}", name=error.name) from error
    return module if homes[name] == name else getattr(module, name)
