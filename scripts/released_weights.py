"""Write src/senet/weights/released.csv: the released weights that our layouts load.

Repositories, preprocessing and licences are those of the installed timm (`pretrained_cfg`), top-1
accuracies those of timm's own table of results, at the resolution at which it is best there; where
a number is not in it, the field stays empty. BN-Inception, which timm does not have, is from
Cadene's pretrained-models.pytorch.

    python scripts/released_weights.py results-imagenet.csv COMMIT

with results/results-imagenet.csv of github.com/huggingface/pytorch-image-models at COMMIT.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._registry import _model_default_cfgs

from senet.models.elsewhere import TIMM_NAMES
from senet.weights.layouts import detect

TARGET = Path(__file__).parents[1] / "src" / "senet" / "weights" / "released.csv"
RESULTS = "https://github.com/huggingface/pytorch-image-models/blob/{}/results/results-imagenet.csv"
FIELDS = (
    *("name", "network", "repository", "url", "layout", "classes", "image_size", "crop_pct"),
    *("interpolation", "mean", "std", "licence", "top1", "top1_source"),
)


def main(results: Path, commit: str) -> None:
    """Write the table, given timm's table of results and the commit that it is of."""
    with results.open(newline="") as file:
        measured = {(row["model"], int(row["img_size"])): row for row in csv.DictReader(file)}
    configurations: dict[str, Any] = _model_default_cfgs  # which timm types as something else
    rows = [
        row
        for theirs in TIMM_NAMES
        for tag in configurations[theirs].cfgs
        if (row := of_timm(f"{theirs}.{tag}", measured, commit))
    ]
    rows.append(
        {
            "name": "bninception.in1k",
            "network": "bn_inception",
            "url": "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth",
            "layout": "bninception",
            "classes": "1000",
            "image_size": "224",
            "crop_pct": "0.875",
            "interpolation": "bilinear",
            "mean": "104 117 128",
            "std": "1 1 1",
        }
    )
    with TARGET.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def of_timm(
    name: str, measured: dict[tuple[str, int], dict[str, str]], commit: str
) -> dict[str, str] | None:
    """A row of the table; None where timm has no weights."""
    theirs = name.partition(".")[0]
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        return None
    sizes = {cfg.input_size[1]: cfg.crop_pct}
    if cfg.test_input_size is not None:
        sizes[cfg.test_input_size[1]] = cfg.test_crop_pct or cfg.crop_pct
    found = {size: measured[name, size] for size in sizes if (name, size) in measured}
    best = max(found, key=lambda size: float(found[size]["top1"]), default=max(sizes))
    with torch.device("meta"):
        layout = detect(timm.create_model(theirs).state_dict()).name
    return {
        "name": name,
        "network": TIMM_NAMES[theirs].name,
        "repository": f"timm/{name}",
        "url": cfg.url if isinstance(cfg.url, str) and cfg.url.startswith("http") else "",
        "layout": layout,
        "classes": str(cfg.num_classes),
        "image_size": str(best),
        "crop_pct": f"{sizes[best]:g}",
        "interpolation": cfg.interpolation,
        "mean": " ".join(f"{value:g}" for value in cfg.mean),
        "std": " ".join(f"{value:g}" for value in cfg.std),
        "licence": cfg.license or "",
        "top1": found[best]["top1"] if found else "",
        "top1_source": RESULTS.format(commit) if found else "",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
