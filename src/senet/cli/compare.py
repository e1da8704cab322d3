"""`senet compare`: a plain network against the same with SE."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from senet.cli.options import (
    MODEL_GROUP,
    NO_DATA,
    NO_MACHINE,
    NO_NETWORK,
    NO_RECIPE,
    NO_SE,
    RECIPE_GROUP,
    RUN_GROUP,
    Config,
    DataFlags,
    MachineFlags,
    NetworkFlags,
    OptionalWhole,
    RecipeFlags,
    SEFlags,
    Switch,
    given,
    of_comparison,
    prepare_process,
)
from senet.support.progress import watch
from senet.support.text import print_table


def compare(
    *,
    model: Annotated[str | None, Parameter(group=MODEL_GROUP)] = None,
    se: SEFlags = NO_SE,
    network: NetworkFlags = NO_NETWORK,
    data: str | None = None,
    data_flags: DataFlags = NO_DATA,
    recipe: Annotated[str | None, Parameter(group=RECIPE_GROUP)] = None,
    recipe_flags: RecipeFlags = NO_RECIPE,
    seeds: Annotated[OptionalWhole, Parameter(group=RUN_GROUP)] = None,
    out: Annotated[Path | None, Parameter(group=RUN_GROUP)] = None,
    resume: Annotated[Path | None, Parameter(group=RUN_GROUP)] = None,
    machine: MachineFlags = NO_MACHINE,
    no_tune_allocator: Annotated[Switch, Parameter(group=RUN_GROUP)] = False,
    config: Annotated[Config, Parameter(group=RUN_GROUP)] = None,
) -> None:
    """Train a plain network and its SE twin alternately, and show what SE gained and cost.

    Both get the same recipe, data and seeds. Prints a table and the paired difference with its
    95% interval; the folder holds a run for each network and seed, figures, results.json and
    report.html. With the recipe quick, 5 epochs, reduction 4 and the gate identity_sigmoid are
    the defaults.

    Args:
        model: the plain network, or its SE twin (default: resnet8_cifar).
        data: embedded, cifar10, cifar100, fashion-mnist, imagenet, places365, or a folder of
            images with train/ and val/ (default: embedded).
        recipe: quick, cifar, imagenet-paper or imagenet-modern (default: quick).
        seeds: runs of each network, with seeds 0, 1, … (default: 3).
        out: folder of the comparison; it must not exist.
        resume: comparison to go on with; finished runs are kept, its own configuration counts.
        no_tune_allocator: leave glibc's memory allocator as it is (slower on Linux CPUs).
    """
    prepare_process(tune_allocator=not no_tune_allocator)
    from senet.experiments.compare import CompareConfig, run_comparison
    from senet.reports.comparison import comparison_table, cost, verdict
    from senet.training.loop import Interrupted

    options = of_comparison(
        model=model,
        data=data,
        recipe=recipe,
        seeds=seeds,
        out=out,
        se=se,
        network=network,
        data_flags=data_flags,
        recipe_flags=recipe_flags,
        machine=machine,
    )
    if resume is None:
        settings = CompareConfig.of_flags(options)
    else:
        settings = CompareConfig.of_folder(resume, refused=options | {"machine": given(machine)})
    try:
        comparison = run_comparison(settings, watch=watch, resume=resume is not None)
    except (Interrupted, KeyboardInterrupt) as stopped:
        hint = f"stopped; to go on: senet compare --resume {settings.out}"
        raise KeyboardInterrupt(hint if settings.started else "") from stopped
    print_table(comparison_table(comparison))
    print(cost(comparison))
    print(verdict(comparison))
    print(f"Runs, figures and report.html: {settings.out}")
