"""The command line: `senet COMMAND`.

Each file holds one command, which only turns flags into calls and loads PyTorch when it is
called, so that `senet --help` is quick.
"""

import importlib.metadata
from collections.abc import Callable

from cyclopts import App

from senet.cli.ablate import ablate
from senet.cli.bench import bench
from senet.cli.compare import compare
from senet.cli.evaluate import evaluate
from senet.cli.explain import explain
from senet.cli.export import export
from senet.cli.fold import fold
from senet.cli.insert import insert
from senet.cli.models import models
from senet.cli.optimize import optimize
from senet.cli.options import apply_config_file
from senet.cli.predict import predict
from senet.cli.recipes import recipes
from senet.cli.shard import shard
from senet.cli.stats import stats
from senet.cli.summary import summary
from senet.cli.train import train

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
    recipes,
    models,
    summary,
    insert,
    explain,
    fold,
    optimize,
    export,
    bench,
    stats,
    shard,
)
for _order, _command in enumerate(COMMANDS):
    app.command(_command, sort_key=_order)
app.register_install_completion_command(
    help="Install the completion of flags by tab in your shell."
)
