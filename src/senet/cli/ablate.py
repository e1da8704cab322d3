"""`senet ablate`: the paper's ablations over one recipe and data set."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

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


def ablate(
    ablation: Literal["reduction", "squeeze", "excitation", "stages", "integration", "nosqueeze"]
    | None = None,
    /,
    *,
    model: Annotated[str | None, Parameter(group=MODEL_GROUP)] = None,
    se: SEFlags = NO_SE,
    network: NetworkFlags = NO_NETWORK,
    data: str | None = None,
    data_flags: DataFlags = NO_DATA,
    recipe: Annotated[str | None, Parameter(group=RECIPE_GROUP)] = None,
    recipe_flags: RecipeFlags = NO_RECIPE,
    seeds: Annotated[OptionalWhole, Parameter(group=RUN_GROUP)] = None,
    processes: Annotated[OptionalWhole, Parameter(group=RUN_GROUP)] = None,
    out: Annotated[Path | None, Parameter(group=RUN_GROUP)] = None,
    resume: Annotated[Path | None, Parameter(group=RUN_GROUP)] = None,
    machine: MachineFlags = NO_MACHINE,
    no_tune_allocator: Annotated[Switch, Parameter(group=RUN_GROUP)] = False,
    config: Annotated[Config, Parameter(group=RUN_GROUP)] = None,
) -> None:
    """Train the variants of one of the paper's ablations, and show them beside the paper's.

    All get the same recipe, data and seeds. The folder holds a run for each variant and seed, and
    results.json. With the recipe quick, 5 epochs, reduction 4 and the gate identity_sigmoid hold
    where the ablation does not vary them.

    Args:
        ablation: reduction (table 10), squeeze (11), excitation (12: the gate), stages (13),
            integration (14 and 15), or nosqueeze (16).
        model: the plain network, or its SE twin (default: resnet8_cifar).
        data: as for 'senet compare' (default: embedded).
        recipe: quick, cifar, imagenet-paper or imagenet-modern (default: quick).
        seeds: runs of each variant, with seeds 0, 1, … (default: 3).
        processes: runs at the same time, which share the cores (default: 1).
        out: folder of the ablation; it must not exist.
        resume: ablation to go on with; finished runs are kept, its own configuration counts.
        no_tune_allocator: leave glibc's memory allocator as it is (slower on Linux CPUs).
    """
    prepare_process(tune_allocator=not no_tune_allocator)
    from senet.errors import UserError
    from senet.experiments.ablate import AblateConfig, ablation_table, run_ablation
    from senet.training.loop import Interrupted

    options = of_comparison(
        ablation=ablation,
        model=model,
        data=data,
        recipe=recipe,
        seeds=seeds,
        processes=processes,
        out=out,
        se=se,
        network=network,
        data_flags=data_flags,
        recipe_flags=recipe_flags,
        machine=machine,
    )
    if resume is not None:
        settings = AblateConfig.of_folder(resume, refused=options | {"machine": given(machine)})
    elif ablation is None:
        raise UserError("name an ablation, such as: senet ablate reduction --out FOLDER")
    else:
        settings = AblateConfig.of_flags(options)
    try:
        found = run_ablation(
            settings, watch=watch, tell=partial(print, flush=True), continued=resume is not None
        )
    except (Interrupted, KeyboardInterrupt) as stopped:
        hint = f"stopped; to go on: senet ablate --resume {settings.out}"
        raise KeyboardInterrupt(hint if settings.started else "") from stopped
    print_table(ablation_table(settings, found))
    print(f"Runs and results.json: {settings.out}")
