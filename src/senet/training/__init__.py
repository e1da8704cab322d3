"""Training: `fit` any network from Python, or a run by its configuration as the command does."""

from typing import TYPE_CHECKING

from senet.support import lazy

if TYPE_CHECKING:
    from senet.training.api import fit as fit
    from senet.training.api import restore as restore
    from senet.training.config import RunConfig as RunConfig
    from senet.training.loop import Interrupted as Interrupted
    from senet.training.loop import RunResult as RunResult
    from senet.training.loop import resume as resume
    from senet.training.loop import train as train
    from senet.training.recipe import RECIPES as RECIPES
    from senet.training.recipe import Recipe as Recipe
    from senet.training.recipe import get_recipe as get_recipe

_HOMES = {
    "RECIPES": "recipe",
    "Interrupted": "loop",
    "Recipe": "recipe",
    "RunConfig": "config",
    "RunResult": "loop",
    "fit": "api",
    "get_recipe": "recipe",
    "restore": "api",
    "resume": "loop",
    "train": "loop",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    return lazy.attribute(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted(__all__)
