"""What `senet compare` and `senet ablate` share: flags, and how they are stopped and go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter

from senet.cli.options import (
    MODEL_GROUP,
    NO_TRAINING,
    RUN_GROUP,
    OptionalWhole,
    TrainingFlags,
    given,
    named,
)
from senet.errors import StopSignal

if TYPE_CHECKING:
    from senet.experiments.compare import CompareConfig

    Settings = TypeVar("Settings", bound=CompareConfig)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ComparisonFlags:
    """Several networks, each with several seeds, in one folder."""

    model: Annotated[str | None, Parameter(group=MODEL_GROUP)] = None
    """The plain network, or its SE twin (default: resnet8_cifar). For compare also timm:NAME,
    torchvision:NAME or FILE.py:FUNCTION, a network with SE, against itself without."""
    training: TrainingFlags = NO_TRAINING
    seeds: Annotated[OptionalWhole, Parameter(group=RUN_GROUP)] = None
    """Runs of each network, with seeds 0, 1, … (default: 3)."""
    processes: Annotated[OptionalWhole, Parameter(group=RUN_GROUP)] = None
    """Runs at the same time, which share the cores (default: 1, with all of them)."""
    out: Annotated[Path | None, Parameter(group=RUN_GROUP)] = None
    """Folder of all runs; it must not exist."""
    resume: Annotated[Path | None, Parameter(group=RUN_GROUP)] = None
    """Folder to go on with; finished runs are kept, its own configuration counts."""

    def settings(self, kind: "type[Settings]", **own: Any) -> "Settings":
        """The configuration that the flags give, or that of the folder to go on with.

        Args:
            kind: `CompareConfig` or what derives from it.
            **own: its further fields; None where they were not given.

        Raises:
            UserError: as for the methods of `kind`.
        """
        training = self.training
        options = named(
            **own,
            model=self.model,
            data=training.data,
            recipe=training.recipe,
            seeds=self.seeds,
            processes=self.processes,
            out=self.out,
            model_options=given(training.network),
            se_options=given(training.se),
            data_options=given(training.data_flags),
            recipe_options=training.recipe_flags.changes(),
            machine=training.machine.run_fields(),
        )
        if self.resume is None:
            return kind.of_flags(options)
        return kind.of_folder(self.resume, refused=options | {"machine": given(training.machine)})


NO_COMPARISON = ComparisonFlags()


@contextmanager
def telling_how_to_go_on(settings: "CompareConfig") -> Iterator[None]:
    """Say with which command what was stopped goes on, once there is a folder to go on with.

    Raises:
        StopSignal: Ctrl-C or SIGTERM came.
    """
    from senet.training.loop import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stopped:
        hint = f"stopped; to go on: senet {settings.COMMAND} --resume {settings.out}"
        number = stopped.number if isinstance(stopped, Interrupted) else signal.SIGINT
        raise StopSignal(hint if settings.started else "", number) from stopped
