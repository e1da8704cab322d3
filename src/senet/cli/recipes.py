"""`senet recipes`: how networks are trained, in numbers."""

import dataclasses
from json import dumps
from typing import Any

from rich.table import Table

from senet.cli.options import Switch
from senet.cli.recipe_flags import flags_of, group_of, helps_of
from senet.cli.tables import new_table, print_table
from senet.data.augmentation import Augmentation
from senet.training.recipe import RECIPES, Recipe, get_recipe


def recipes(name: str | None = None, /, *, json: Switch = False) -> None:
    """List the recipes, or show all values of one, each with the flag that changes it.

    Args:
        name: of a recipe; all by default.
        json: print JSON instead of a table.
    """
    if json:
        chosen = RECIPES.values() if name is None else [get_recipe(name)]
        print(dumps({recipe.name: recipe.to_dict() for recipe in chosen}, indent=1))
    else:
        print_table(_all() if name is None else _one(get_recipe(name)))


def _all() -> Table:
    right = ("epochs", "batch", "lr")
    table = new_table("recipe", right=right)
    for column in ("optimizer", "schedule", "augmentation"):
        table.add_column(column)
    plain = Augmentation()
    for recipe in RECIPES.values():
        images = recipe.augmentation
        changed = [
            f"{each.name} {_text(value)}" if not isinstance(value, bool) else each.name
            for each in dataclasses.fields(images)
            if (value := getattr(images, each.name)) != getattr(plain, each.name)
        ]
        table.add_row(
            recipe.name,
            str(recipe.epochs),
            str(recipe.batch_size),
            f"{recipe.lr:g}",
            recipe.optimizer,
            recipe.schedule,
            ", ".join(changed),
        )
    return table


def _one(recipe: Recipe) -> Table:
    table = Table(title=recipe.name, title_justify="left")
    for column in ("flag", "value", "meaning"):
        table.add_column(column, overflow="fold")
    before = None
    for owner in (recipe, recipe.augmentation):
        helps = helps_of(type(owner))
        for each in dataclasses.fields(owner):
            if each.name in ("name", "augmentation"):
                continue
            if before not in (None, group_of(each)):
                table.add_section()
            before = group_of(each)
            value = getattr(owner, each.name)
            table.add_row(flags_of(each)[0], _text(value), _first_sentence(helps[each.name]))
    return table


def _first_sentence(text: str) -> str:
    return f"{text.split('. ')[0].split('; ')[0].rstrip('.')}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:.3g}" for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
