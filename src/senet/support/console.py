"""Where text goes to a terminal: names are letters there, whatever they are made of."""

from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

from senet.support.text import visible


class PlainConsole(Console):
    """A console to which `[b]`, `:dog:` and bytes that are no text are letters, not markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as it stands, without what only a terminal would understand."""
        plain = {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(visible(text), **{**options, **plain})


class PlainColumn(TextColumn):
    """A column of a progress bar whose text is no markup.

    Args:
        text_format: of `rich.progress.TextColumn`, such as `{task.description}`.
    """

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, markup=False)

    def render(self, task: Any) -> Text:
        return Text(visible(super().render(task).plain))
