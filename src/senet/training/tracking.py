"""Runs in wandb, mlflow or trackio, through accelerate's trackers."""

from collections.abc import Mapping
from typing import Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from senet.errors import UserError
from senet.support.progress import Progress
from senet.training.config import RunConfig, flatten

Tracker = Literal["wandb", "mlflow", "trackio"]
PROJECT = "senet"
_RUN_NAME = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}


class Tracking(Progress):
    """Tells a tracker the loss and the learning rate of each step, and each row of metrics.csv.

    Args:
        name: "wandb", "mlflow" or "trackio", whose own settings (server, project's owner) count.
        config: the run; its options are the tracker's configuration.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, name: Tracker, config: RunConfig) -> None:
        if name not in get_available_trackers():
            raise UserError(f"track {name!r} needs the package {name}: pip install {name}")
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        self.tracker = kind(PROJECT, **{_RUN_NAME[name]: config.out.name})
        self.options = {key: _plain(value) for key, value in flatten(config.to_dict()).items()}
        self.number = 0
        self.begun = False

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Start the tracker at the first epoch, when the run has begun; count steps over all."""
        if not self.begun:
            self.tracker.start()
            self.tracker.store_init_configuration(self.options)
            self.begun = True
        self.number = (epoch - 1) * steps + done

    def step(self, images: int, loss: float, lr: float) -> None:
        self.number += 1
        self.tracker.log({"step/loss": loss, "step/lr": lr}, step=self.number)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        values = {f"epoch/{name}": value for name, value in row.items() if name != "step"}
        self.tracker.log(values, step=self.number)

    def close(self) -> None:
        """Tell the tracker that the run is over."""
        if self.begun:
            self.tracker.finish()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, list) else value
