"""Put SE blocks into any CNN without changing what it computes, and take them out again."""

import copy
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal, SupportsIndex, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from senet.anatomy.example import attempt, example_arguments
from senet.anatomy.graph import Trace
from senet.anatomy.recording import record, run
from senet.errors import SenetError, UserError
from senet.insertion.places import (
    Refused,
    Site,
    Sites,
    automatic_sites,
    channel_dimension,
    concat_sites,
    conv_sites,
    named_sites,
    residual_sites,
    stages_of,
    unique,
)
from senet.insertion.replace import replace_block
from senet.insertion.report import InsertionReport, Place
from senet.insertion.twins import become_twin, twin_places
from senet.models import Network
from senet.models.vgg import ReLUSE
from senet.nn.block import GateName, SqueezeExcitation, hidden_width
from senet.nn.hooks import scale_by
from senet.support.containers import named_parts

Rule = Literal["auto", "residual", "concat", "conv"]
RULES: tuple[str, ...] = get_args(Rule)
CHILD = "se"
RECORD = "senet_insertion"  # attribute of a model with inserted blocks: what `remove` must undo
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # iterate over their children


def insert(
    model: nn.Module,
    *,
    where: Rule | Sequence[str] | Callable[[str, nn.Module], bool] = "auto",
    reduction: float = 16,
    gate: GateName = "identity_sigmoid",
    stages: Iterable[int] | None = None,
    example_input: Any = None,
    optimizers: Iterable[Optimizer] | Optimizer = (),
) -> InsertionReport:
    """Put SE blocks into a CNN, in place; with the default gate its output stays bit-identical.

    The gate 2·sigmoid with a zero last layer is exactly 1 (algebra: x · 1 = x), in evaluation and
    in training, and its gradient is alive: the last layer learns at the first step, the first
    layer from the second one on; hidden units that no image of the example input activates start
    with the opposite sign. All modules, parameters and buffers keep their names and values;
    a block is a new child `se` of the module whose output it scales. No random number is drawn
    from PyTorch's global generator.

    Networks of this package become their SE twin (`resnet50` → `se_resnet50`): same places, same
    names, same fused tails. In other networks the places come from a recorded forward pass.

    Args:
        model: the network, changed in place.
        where: "residual" (end of each residual branch, before its addition and before drop path
            and layer scale), "concat" (output of each module that ends in a concatenation),
            "conv" (end of each block of convolutions), "auto" (the first two; "conv" where there
            are none), names of modules whose output is scaled, or a function of (name, module)
            that chooses them.
        reduction: r; the hidden width is floor(C / r), at least 1.
        gate: gate of the blocks; any other than "identity_sigmoid" changes the output.
        stages: stages that get SE, numbered as in the paper (2 is the first behind the stem; in
            foreign networks a stage is a run of places whose maps have one size); None: all.
        example_input: what the model is called with: a tensor (N,C,*), or a tuple of arguments.
            By default zeros of `model.input_size` or, for timm, of its configuration.
        optimizers: optimizers of the model; each learns the new parameters, as a group with its
            first group's learning rate. Pass them before a scheduler is made.

    Returns:
        What went where.

    Raises:
        UserError: wrapped, compiled or scripted models, models that have SE there already, no
            place found, a name that does not exist, a named module whose calls no one block fits,
            an argument out of range, or an example input that the model does not take.
        SenetError: with the blocks the model does not run, or gives something else.

    Whatever is raised, the model and its optimizers are as before.
    """
    _check_model(model)
    optimizers = _as_optimizers(optimizers)
    _check_optimizers(model, optimizers)
    where = _as_where(where)
    # Validates reduction and gate, and costs nothing.
    try:
        SqueezeExcitation(1, reduction, gate=gate, device="meta")
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    chosen = None if stages is None else _as_stages(stages)
    arguments = example_arguments(model, example_input)
    own = isinstance(model, Network) and isinstance(where, str) and where in ("auto", "residual")
    skipped: tuple[tuple[str, str], ...] = ()
    if own:
        assert isinstance(model, Network)
        before = attempt(lambda: run(model, arguments), arguments)
        places = twin_places(model, reduction, gate, chosen)
    else:
        trace = attempt(lambda: record(model, arguments), arguments)
        before = trace.result
        places, skipped = _traced_places(model, trace, where, reduction, chosen)
    attach(model, places, gate=gate)
    try:
        if own:
            become_twin(model, reduction, gate, chosen)
        identical = _tried(model, places, arguments, before, gate)
        new = [p for place in places for p in model.get_submodule(place.block).parameters()]
        for optimizer in optimizers:
            optimizer.add_param_group({"params": new, "lr": optimizer.param_groups[0]["lr"]})
    except BaseException:  # Ctrl-C too: half an insertion could be neither used nor removed
        remove(model, optimizers=optimizers)
        raise
    return InsertionReport(tuple(places), tuple(skipped), reduction, gate, identical)


def _tried(
    model: nn.Module, places: Sequence[Place], arguments: tuple[Any, ...], before: Any, gate: str
) -> bool | None:
    """Run the model with its new blocks; whether the output is what it was, if it shall be.

    Raises:
        SenetError: it does not run, or the output has changed.
    """
    try:
        _revive(model, places, arguments)
        after = run(model, arguments)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SenetError(
            "the model does not run with the SE blocks, so they were taken out again: perhaps it "
            f"iterates over its submodules ({reason}); name other modules by where=[…]"
        ) from error
    if gate != "identity_sigmoid":
        return None
    identical = _same(before, after)
    if identical is False:
        raise SenetError(
            "the model's output changed on insertion, so the blocks were taken out again: it "
            "is not deterministic in evaluation mode, or it iterates over its submodules; "
            "name other modules by where=[…]"
        )
    return identical


def _as_optimizers(optimizers: Any) -> tuple[Any, ...]:
    if isinstance(optimizers, Optimizer):
        return (optimizers,)
    if not isinstance(optimizers, Iterable):
        raise UserError(
            f"optimizers must be torch optimizers, one or a list of them, got {optimizers!r}; "
            "leave it out where there is none"
        )
    return tuple(optimizers)


def _as_where(where: Any) -> Any:
    """The argument itself, or the names in it, which may come from a generator."""
    if isinstance(where, str):
        return where
    if callable(where) and not isinstance(where, nn.Module | type):
        return where
    if isinstance(where, Iterable) and not isinstance(where, nn.Module | type):
        return tuple(where)
    raise UserError(
        f"where must be one of {', '.join(RULES)}, names of modules (where=['layer1']), or a "
        f"function of (name, module), got {where if where is None else type(where).__name__}"
    )


def _as_stages(stages: Any) -> tuple[int, ...]:
    numbers = tuple(stages) if isinstance(stages, Iterable) else ()
    if not numbers or not all(isinstance(number, SupportsIndex) for number in numbers):
        raise UserError(f"stages must be whole numbers, such as (3, 4), got {stages!r}")
    return tuple(int(number) for number in numbers)


def _check_model(model: nn.Module) -> None:
    """Raise UserError for models that are wrapped, fused, compiled, scripted or uninitialised."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, RECORD):
        raise UserError(
            "the model already has SE blocks of senet.insert; senet.remove(model) first"
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        inside = f" ({name})" if name else ""
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or (
            kind in ("FullyShardedDataParallel", "FSDPModule")
            or any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
        ):
            raise UserError(
                f"model is wrapped in {kind}{inside}, which would not see the new parameters; "
                "insert into model.module first and wrap afterwards"
            )
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise UserError(
                f"model is compiled{inside}; insert before torch.compile (the original of a "
                "compiled model is model._orig_mod)"
            )
        if type(vars(module).get("forward")).__module__ == "senet.fusion.forward":
            raise UserError(
                f"model is fused{inside}; senet.unfuse(model) first, insert, and fuse again"
            )
        if isinstance(module, torch.jit.ScriptModule) and not name:
            raise UserError("model is scripted; insert before torch.jit.script or torch.jit.trace")
        if any(nn.parameter.is_lazy(p) for p in module._parameters.values()):
            raise UserError(f"{name} is not initialised yet; run the model once before insert")


def _check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise UserError for what is no optimizer of the model's parameters."""
    known = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"optimizers must be torch optimizers, got {type(optimizer).__name__}")
        params = (p for group in optimizer.param_groups for p in group["params"])
        if not any(id(p) in known for p in params):
            raise UserError(
                f"{type(optimizer).__name__} trains no parameter of this model; pass the "
                "optimizer that was made from model.parameters()"
            )


def attach(model: nn.Module, places: Sequence[Place], *, gate: str) -> None:
    """Put fresh SE blocks at known places; `insert` found them before, in this or an equal model.

    Args:
        model: the network, changed in place.
        places: where, with channels and hidden widths.
        gate: gate of the blocks.
    """
    done = []
    try:
        with torch.random.fork_rng(devices=[]):
            for place in places:
                _attach_one(model, place, gate)
                done.append(place)
    except BaseException:
        for place in done:
            replace_block(model, place.block, None)
        raise
    inserted = {"places": [asdict(place) for place in places], "gate": gate}
    config = getattr(model, "config", None)
    setattr(model, RECORD, {**inserted, "config": copy.deepcopy(config)})
    if isinstance(config, dict):  # what a checkpoint of the model is rebuilt from
        model.config = {**config, "inserted": inserted}  # type: ignore[assignment]


def _attach_one(model: nn.Module, place: Place, gate: str) -> None:
    target = model.get_submodule(place.module)
    reference = next(target.parameters(), None)
    if reference is None:
        reference = next(model.parameters())
    se = SqueezeExcitation(
        place.channels,
        hidden=place.hidden,
        gate=gate,  # type: ignore[arg-type]  # a name that insert has checked
        dims=place.dims,
    )
    se = se.to(reference.device, reference.dtype).train(model.training)
    if place.kind == "twin" and isinstance(target, nn.ReLU):
        model.set_submodule(place.module, ReLUSE(se))
    elif place.kind == "twin":
        target.se = se
        if hasattr(target, "integration"):
            target.integration = "standard"  # type: ignore[assignment]
    else:
        _hook(model, target, place, se)


def _revive(model: nn.Module, places: Sequence[Place], arguments: tuple[Any, ...]) -> None:
    """Flip the sign of hidden units that the example input does not activate.

    Behind a batch norm the squeezed maps of all images lie close together, so that a fresh unit is
    on for nearly all of them or off for nearly all, and narrow blocks would start with no gradient.
    The weights are drawn symmetrically about 0: flipped ones are as likely as those drawn.
    """

    @torch.no_grad()
    def flip(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        assert isinstance(module, nn.Linear)
        sign = torch.where((output <= 0).all(0), -1, 1).to(output.dtype)
        module.weight.mul_(sign[:, None])
        module.bias.mul_(sign)
        return output * sign

    blocks = [model.get_submodule(place.block) for place in places]
    handles = [block.get_submodule("fc1").register_forward_hook(flip) for block in blocks]
    try:
        run(model, arguments)
    finally:
        for handle in handles:
            handle.remove()


def inserted_places(model: nn.Module) -> tuple[Place, ...]:
    """The places of the SE blocks that `insert` put into this model; none if it never did."""
    return tuple(Place(**place) for place in getattr(model, RECORD, {}).get("places", ()))


def remove(model: nn.Module, *, optimizers: Iterable[Optimizer] | Optimizer = ()) -> None:
    """Undo `insert`: take out its SE blocks and hooks; everything else stays as it is.

    Args:
        model: the model that was given to `insert`, or a copy of it; changed in place.
        optimizers: optimizers that forget the blocks' parameters.

    Raises:
        UserError: nothing was inserted.
    """
    optimizers = _as_optimizers(optimizers)
    record_ = getattr(model, RECORD, None)
    if record_ is None:
        raise UserError("nothing to remove: senet.insert put no SE blocks into this model")
    if any(place.block not in dict(model.named_modules()) for place in inserted_places(model)):
        raise UserError("nothing to remove: some of the inserted blocks were folded away")
    gone: set[int] = set()
    for place in inserted_places(model):
        gone |= {id(parameter) for parameter in model.get_submodule(place.block).parameters()}
        replace_block(model, place.block, None)
    if isinstance(record_["config"], dict):
        model.config = record_["config"]  # type: ignore[assignment]
    delattr(model, RECORD)
    for optimizer in optimizers:
        _forget(optimizer, gone)


def _forget(optimizer: Optimizer, gone: set[int]) -> None:
    kept = []
    for group in optimizer.param_groups:
        forgotten = [p for p in group["params"] if id(p) in gone]
        for parameter in forgotten:
            optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) not in gone]
        if group["params"] or not forgotten:
            kept.append(group)
    optimizer.param_groups[:] = kept


def _hook(model: nn.Module, target: nn.Module, place: Place, se: SqueezeExcitation) -> None:
    holder_name, _, child = place.block.rpartition(".")
    model.get_submodule(holder_name).add_module(child, se)
    scale_by(target, se, channels_last=place.channels_last)


def _block_name(model: nn.Module, name: str) -> str:
    """Where the SE block of a module is registered: as its child, unless it is a container.

    A container runs through its children, so the next module around it that is none takes it.
    """
    if not isinstance(model.get_submodule(name), _CONTAINERS):
        return f"{name}.{CHILD}"
    parts = name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        holder = ".".join(parts[:length])
        if not isinstance(model.get_submodule(holder), _CONTAINERS):
            child = "_".join((*parts[length:], CHILD))
            return f"{holder}.{child}" if holder else child
    raise UserError(
        f"{name} and all modules around it are containers; wrap the model in a module of your own"
    )


def _traced_places(
    model: nn.Module,
    trace: Trace,
    where: Rule | Sequence[str] | Callable[[str, nn.Module], bool],
    reduction: float,
    chosen: tuple[int, ...] | None,
) -> tuple[list[Place], tuple[tuple[str, str], ...]]:
    try:
        sites = _sites(model, trace, where)
    except Refused as refused:
        raise UserError(
            f"the model already has SE there: {refused}; insert into the network without SE, or "
            "name other modules by where=[…]"
        ) from None
    ordered = unique(sites.found)
    numbers = stages_of(ordered)
    if chosen is not None:
        unknown = sorted(set(chosen) - set(numbers))
        if unknown or not chosen:
            raise UserError(
                f"stages must be numbers out of {sorted(set(numbers))} for this model, got "
                f"{list(chosen)}"
            )
    places = []
    for site, stage in zip(ordered, numbers, strict=True):
        if chosen is None or stage in chosen:
            places.append(_place(model, trace, site, stage, reduction))
    if not places:
        reasons = "; ".join(f"{place}: {why}" for place, why in sites.skipped[:3])
        convs = any(node.kind == "conv" for node in trace.nodes)
        why = reasons or ("no place matches" if convs else "it has no convolutions")
        raise UserError(
            f"no place for SE found in {type(model).__name__} ({why}); name modules that return "
            "feature maps (N,C,*) by where=[…]"
        )
    return places, sites.skipped


def _place(model: nn.Module, trace: Trace, site: Site, stage: int, reduction: float) -> Place:
    node = site.node
    dimension = channel_dimension(node)
    if dimension not in (1, len(node.shape) - 1):
        raise UserError(
            f"{site.call.name} returns a map whose channels stand in dimension {dimension}; SE "
            "takes (N,C,*) or (N,*,C): leave it out by where=[…]"
        )
    block = _block_name(model, site.call.name)
    holder_name, _, child = block.rpartition(".")
    holder = model.get_submodule(holder_name)
    if getattr(holder, child, None) is not None:
        raise UserError(
            f"{block} exists already: the model has SE there; leave {site.call.name} out by "
            "where=[…]"
        )
    # Many blocks run `self.se` where it is not None: a block of that name would run twice.
    while hasattr(holder, child):
        child = f"inserted_{child}"
    block = f"{holder_name}.{child}" if holder_name else child
    channels = node.shape[dimension]
    return Place(
        module=site.call.name,
        block=block,
        kind=site.kind,
        stage=stage,
        channels=channels,
        hidden=hidden_width(channels, reduction),
        dims=len(node.shape) - 2,
        channels_last=dimension != 1,
        calls=len(trace.calls_of(site.call.module)),
    )


def _sites(
    model: nn.Module, trace: Trace, where: Rule | Sequence[str] | Callable[[str, nn.Module], bool]
) -> Sites:
    if isinstance(where, str):
        if where not in RULES:
            close = difflib.get_close_matches(where, dict(model.named_modules()), n=1)
            hint = f"; for one module give a list: where=[{close[0]!r}]" if close else ""
            raise UserError(f"where must be one of {', '.join(RULES)}, got {where!r}{hint}")
        if where == "residual":
            return residual_sites(trace)[0]
        rules = {"auto": automatic_sites, "concat": concat_sites, "conv": conv_sites}
        return rules[where](trace)
    modules = dict(model.named_modules(remove_duplicate=False))
    if callable(where):
        called = {id(call.module) for call in trace.calls if _is_map(call.output)}
        picked = {n: m for n, m in modules.items() if n and id(m) in called and where(n, m)}
    else:
        for name in where:
            if not isinstance(name, str) or not name or name not in modules:
                close = difflib.get_close_matches(str(name), modules, n=1, cutoff=0.4)
                hint = f"did you mean {close[0]!r}?" if close else "see model.named_modules()"
                raise UserError(f"where: the model has no module {name!r}; {hint}")
        picked = {name: modules[name] for name in where}
    sites = named_sites(trace, picked)
    if sites.skipped:
        name, why = sites.skipped[0]
        raise UserError(f"where: SE cannot follow {name!r}: {why}; leave it out, or name others")
    return sites


def _is_map(node: Any) -> bool:
    return node is not None and node.is_map


def _same(before: Any, after: Any) -> bool | None:
    """Whether two outputs hold the same tensors; None where there are none to be found.

    Containers are those that PyTorch knows, mappings and dataclasses; other values count by their
    type alone.
    """
    from torch.utils._pytree import tree_flatten

    (a, a_spec), (b, b_spec) = tree_flatten(before), tree_flatten(after)
    if a_spec != b_spec:
        return False
    found = None
    for x, y in zip(a, b, strict=True):
        if type(x) is not type(y):
            return False
        if isinstance(x, Tensor):
            same: bool | None = _same_tensor(x, y)
        elif (parts := named_parts(x)) is not None:
            same = _same(parts, named_parts(y))
        else:
            continue
        if same is False:
            return False
        found = found or same
    return found


def _same_tensor(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.nan_to_num(0), y.nan_to_num(0)) and torch.equal(x.isnan(), y.isnan())
