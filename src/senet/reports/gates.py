"""The self-contained HTML report on gates: numbers and images as JSON inside one page."""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from senet.gates.statistics import BlockStatistics, GateStatistics

THUMBNAIL = 96  # pixels
CLASS_NUMBERS = 2_000_000  # means by class and channel that a page may hold
_LINE_SEPARATORS = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def explain_page(
    statistics: GateStatistics,
    title: str,
    summary: str,
    image: Callable[[int], tuple[Image.Image, str]],
    *,
    images: int = 400,
    classes: Sequence[int] = (),
) -> str:
    """The report as one HTML file that loads nothing.

    Args:
        statistics: from `record_gates`.
        title: heading; any text.
        summary: one sentence below it; any text.
        image: gives the image at a position of the data set and the name of its class.
        images: most images that the page holds; channels whose gates depend most on the class
            come first.
        classes: numbers of classes that must be in the page where not all fit into it.
    """
    import plotly.offline

    shown = _shown_classes(statistics, classes)
    top, wanted = _top_images(statistics, images)
    pictures = {}
    for position in wanted:
        picture, label = image(position)
        pictures[str(position)] = {"source": _thumbnail(picture), "label": label}
    stage_of = {name: stage for stage, names in statistics.stages().items() for name in names}
    data = {
        "classes": [statistics.classes[k] for k in shown],
        "totalClasses": len(statistics.classes),
        "blocks": [
            _block(block, stage_of[name], shown, top[name])
            for name, block in statistics.blocks.items()
        ],
        "images": pictures,
    }
    left = len(statistics.classes) - len(shown)
    caption = "Shares are of the variance of all gates of a block over all images."
    if left:
        caption += f" The page holds {len(shown)} of {len(statistics.classes)} classes."
    parts = {
        "TITLE": html.escape(title),
        "SUMMARY": html.escape(summary),
        "BLOCKS_CAPTION": html.escape(caption),
        "STYLE": _template("explain.css"),
        "SCRIPT": _template("explain.js"),
        "PLOTLY": plotly.offline.get_plotlyjs(),
        "DATA": _json(data),
    }
    pieces = _template("explain.html").split("%%")
    # Split once, so that %%…%% inside a class name or a library is never taken for a placeholder.
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _template(name: str) -> str:
    return resources.files("senet.reports").joinpath("templates", name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character, escaped in _LINE_SEPARATORS.items():
        text = text.replace(character, escaped)
    return text


def _numbers(values: Tensor) -> Any:
    """Nested lists with four digits; None for what is not a number."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [round(v, 4) if v == v else None for v in values.tolist()]


def _block(
    block: BlockStatistics, stage: int, shown: list[int], top: list[list[list[float]]]
) -> dict[str, Any]:
    mean, std = block.class_mean[shown], block.class_std[shown]
    return {
        "name": block.name,
        "stage": stage,
        "channels": block.channels,
        "gate": block.gate,
        "average": round(float(block.mean.mean()), 4),
        "deviation": round(float(block.variance.mean().sqrt()), 4),
        "between": round(block.between_share, 5),
        "saturation": block.saturation,
        "overall": _numbers(block.mean),
        "quantiles": _numbers(torch.stack([block.quantile(q) for q in (0.05, 0.5, 0.95)])),
        "betweenBy": _numbers(block.between_by_channel),
        "count": block.moments.count[shown].tolist(),
        "mean": _numbers(mean),
        "std": _numbers(std),
        "top": top,
    }


def _shown_classes(statistics: GateStatistics, wanted: Sequence[int]) -> list[int]:
    """Numbers of the classes with images that the page holds: all, or as many as fit."""
    count = next(iter(statistics.blocks.values())).moments.count
    present = torch.nonzero(count)[:, 0].tolist()
    channels = sum(block.channels for block in statistics.blocks.values())
    fit = max(CLASS_NUMBERS // channels, 2)
    if len(present) <= fit:
        return present
    spread = torch.linspace(0, len(present) - 1, fit - len(wanted)).round().long().tolist()
    return sorted({*wanted, *(present[index] for index in spread)})


def _top_images(
    statistics: GateStatistics, most: int
) -> tuple[dict[str, list[list[list[float]]]], list[int]]:
    """By block and channel the positions and gates of the images kept, and all positions."""
    order = [
        (float(share), name, channel)
        for name, block in statistics.blocks.items()
        for channel, share in enumerate(block.between_by_channel)
    ]
    order.sort(key=lambda item: -item[0])
    top: dict[str, list[list[list[float]]]] = {
        name: [[] for _ in range(block.channels)] for name, block in statistics.blocks.items()
    }
    kept: dict[int, None] = {}
    for _, name, channel in order:
        images = statistics.blocks[name].top
        found = [
            (int(image), round(float(value), 4))
            for image, value in zip(images.images[channel], images.values[channel], strict=True)
            if int(image) >= 0
        ]
        if len(kept.keys() | {image for image, _ in found}) > most:
            continue
        kept.update(dict.fromkeys(image for image, _ in found))
        top[name][channel] = [[image, value] for image, value in found]
    return top, list(kept)


def _thumbnail(picture: Image.Image) -> str:
    """A small image as a data URI: PNG where it is small anyway, JPEG else."""
    picture = picture.convert("L" if picture.mode == "L" else "RGB")
    kind = "PNG" if max(picture.size) <= THUMBNAIL // 2 else "JPEG"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
