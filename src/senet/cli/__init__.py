"""The command line: `senet COMMAND`.

Each file holds one command, which only turns flags into calls and loads PyTorch when it is
called, so that `senet --help` is quick.
"""

import importlib.metadata
from collections.abc import Callable

from cyclopts import App

from .ablate import ablate
from .bench import bench
from .compare import compare
from .evaluate import evaluate
from .explain import explain
from .export import export
from .fold import fold
from .insert import insert
from .models import models
from .options import apply_config_file
from .predict import predict
from .shard import shard
from .summary import summary
from .train import train

app = App(
    name="senet",
    help="Squeeze-and-Excitation networks. `senet COMMAND --help` lists the flags of a command.",
    version=importlib.metadata.version("senet"),
    config=apply_config_file,
    suppress_keyboard_interrupt=False,
)
COMMANDS: tuple[Callable[..., int | None], ...] = (
    train,
    compare,
    ablate,
    evaluate,
    predict,
    models,
    summary,
    insert,
    explain,
    fold,
    export,
    bench,
    shard,
)
for _order, _command in enumerate(COMMANDS):
    app.command(_command, sort_key=_order)
