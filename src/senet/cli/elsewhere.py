"""What the flags of timm, ultralytics and Lightning are called here."""

from cyclopts import UnknownOptionError

_OF_TRAINING = {
    "freeze": "--train head",
    "freeze-backbone": "--train head",
    "linear-probe": "--train head",
    "pretrained": "--init pretrained",
    "initial-checkpoint": "--init",
    "checkpoint": "--init",
    "ckpt-path": "--resume",
    "project": "--out",
    "output": "--out",
    "name": "--out",
    "imgsz": "--image-size",
    "img-size": "--image-size",
    "input-size": "--image-size",
    "batch": "--batch-size",
    "b": "--batch-size",
    "max-epochs": "--epochs",
    "lr0": "--lr",
    "learning-rate": "--lr",
    "opt": "--optimizer",
    "sched": "--schedule",
    "scheduler": "--schedule",
    "lr-scheduler": "--schedule",
    "cos-lr": "--schedule cosine",
    "amp": "--mixed-precision bf16",
    "precision": "--mixed-precision",
    "half": "--mixed-precision bf16",
    "wd": "--weight-decay",
    "smoothing": "--label-smoothing",
    "model-ema": "--ema 0.9998",
    "model-ema-decay": "--ema",
    "clip-grad": "--grad-clip",
    "gradient-clip-val": "--grad-clip",
    "early-stopping": "--patience",
    "accumulate-grad-batches": "--accumulate",
    "grad-accum-steps": "--accumulate",
    "aa": "--policy",
    "auto-augment": "--policy",
    "reprob": "--random-erasing",
    "hflip": "--flip",
    "fliplr": "--flip",
    "drop": "--dropout",
    "drop-rate": "--dropout",
    "drop-path-rate": "--drop-path",
    "in-chans": "--channels",
    "in-channels": "--channels",
    "classes": "nothing: the data say which classes there are",
    "num-classes": "nothing: the data say which classes there are",
    "torchcompile": "--compile",
    "devices": "torchrun --nproc-per-node=N -m senet train",
}
_OF_ALL = {
    "pretrained": "the word pretrained in the place of the checkpoint, with --model",
    "j": "--workers",
    "dataset": "--data",
    "data-dir": "--data",
    "source": "the images, without a flag",
    "conf": "--top",
    "topk": "--top",
    "gpu": "--device cuda",
    "cpu": "--device cpu",
    "ckpt": "the checkpoint, without a flag",
    "format": "the ending of the file",
    "out": "> FILE behind the command: it prints its result (predict: with --csv or --json)",
    "batch-size": "--batch",
}


def told_otherwise(error: UnknownOptionError, command: str) -> str | None:
    """How an unknown flag is called here, if it is known from elsewhere."""
    flag = error.token.keyword or error.token.value
    name = flag.partition("=")[0].lstrip("-").replace("_", "-").lower()
    known = _OF_ALL | (_OF_TRAINING if command in ("train", "compare", "ablate") else {})
    here = known.get(name)
    if here is None:
        return None
    if not here.startswith("--"):
        return f"Unknown option: {flag}. Here that is {here}."
    taken = {name for argument in error.argument_collection for name in argument.names}
    return f"Unknown option: {flag}. Here that is {here}." if here.split()[0] in taken else None
