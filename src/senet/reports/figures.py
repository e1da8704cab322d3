"""Figures of a run and of a comparison: learning curves, confusion matrices, gates per stage.

Every function returns a `matplotlib.figure.Figure` made without pyplot, so that nothing is kept
alive globally and no display is needed; `save_figure` writes it as PNG and SVG. Colours are those
of Okabe and Ito, which people with any of the common colour vision deficiencies can tell apart;
lines differ in their dashes as well.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from senet.reports.fonts import find_letters
from senet.support.files import atomic_write
from senet.support.text import visible

Theme = Literal["light", "dark"]
Row = Mapping[str, float]
Gates = Mapping[str, NDArray[np.float64]]
"""Mean gates by layer name: an array (classes, channels) each."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1)), (0, (8, 2)))
LONG_NAME = 20  # two of them do not stand side by side in a legend
MAX_GATE_CLASSES = 4  # as in fig. 6 of the paper: more lines can no longer be told apart
MAX_NUMBERED_CLASSES = 12
MAX_LABELLED_CLASSES = 40
MAX_NUMBERS = 6

_BASE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "senet",
}
_DARK: dict[Any, Any] = {
    "figure.facecolor": "#16181d",
    "savefig.facecolor": "#16181d",
    "axes.facecolor": "#16181d",
    "text.color": "#e6e6e6",
    "axes.labelcolor": "#e6e6e6",
    "axes.edgecolor": "#9aa0a6",
    "xtick.color": "#e6e6e6",
    "ytick.color": "#e6e6e6",
    "grid.color": "#9aa0a6",
    "axes.prop_cycle": cycler(color=["#56B4E9", "#E69F00", "#009E73", "#CC79A7"]),
}
_LIGHT: dict[Any, Any] = {"axes.prop_cycle": cycler(color=list(COLOURS))}


@contextmanager
def themed(theme: Theme = "light") -> Iterator[None]:
    """Set the fonts and colours of figures drawn and saved inside the block."""
    with mpl.rc_context({**_BASE, **(_DARK if theme == "dark" else _LIGHT)}):
        yield


def _colour(index: int) -> Any:
    cycle = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    return cycle[index % len(cycle)]


def _ink() -> str:
    return str(mpl.rcParams["text.color"])


def _label(name: str) -> str:
    """A name for a legend, which leaves out what begins with an underscore."""
    shown = visible(name)
    return f" {shown}" if shown.startswith("_") else shown


def learning_curves(
    histories: Mapping[str, Sequence[Sequence[Row]]],
    judged: str = "top1",
    heading: str = "top-1",
    loss_unit: str = "cross-entropy (nats, log scale)",
) -> Figure:
    """Validation top-1 accuracy and losses by epoch, the mean over seeds with its spread.

    Args:
        histories: by network, a history a seed: rows with `epoch` (from 1), `train_loss`,
            `val_loss` and `judged`. Seeds of different lengths are cut to the shortest.
        judged: the column beside the losses; "top1" and "mean_ap" are in %.
        heading: what it is called.
        loss_unit: what the losses are.

    Returns:
        Two panels: accuracy (%), and training (line) and validation loss (nats, faint line).
        The band reaches from the lowest to the highest seed.
    """
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for index, (label, runs) in enumerate(histories.items()):
        length = min(len(run) for run in runs)
        epochs = np.array([row["epoch"] for row in runs[0][:length]])
        count = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
        for axes, column, style, suffix in (
            (accuracy, judged, "-", ""),
            (loss, "train_loss", "-", ", training"),
            (loss, "val_loss", (0, (2, 1.5)), ", validation"),
        ):
            values = np.array([[row[column] for row in run[:length]] for run in runs])
            axes.fill_between(
                epochs,
                values.min(axis=0),
                values.max(axis=0),
                color=_colour(index),
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(
                epochs,
                values.mean(axis=0),
                linestyle=style,
                marker="os^D"[index % 4] if axes is accuracy or length == 1 else "",
                markersize=4.5,
                linewidth=2,
                color=_colour(index),
                label=_label(label + (count if axes is accuracy else suffix)),
            )
    unit = " (%)" if judged in ("top1", "mean_ap") else ""
    name = "Accuracy" if judged == "top1" else heading
    accuracy.set(title=f"{name} on the validation set", xlabel="epoch", ylabel=f"{heading}{unit}")
    loss.set(title="Loss", xlabel="epoch", ylabel=loss_unit)
    columns = 1 if max(map(len, histories)) > LONG_NAME else 2
    for axes in (accuracy, loss):  # beneath: inside it would lie on a curve sooner or later
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=9.5)
        axes.set_xlim(epochs[0] - 0.3, epochs[-1] + 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    # Before BN's running statistics have settled, a validation loss can be tens of times the rest.
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    loss.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    loss.yaxis.set_minor_formatter(NullFormatter())
    return figure


def predictions(
    truth: NDArray[np.float64], given: NDArray[np.float64], names: Sequence[str]
) -> Figure:
    """Predicted against true numbers, a panel a number; of many the first ones.

    Args:
        truth: (N,K).
        given: (N,K), what the network gives.
        names: K.
    """
    shown = min(len(names), MAX_NUMBERS)
    columns = min(shown, 3)
    rows = -(-shown // columns)
    size = (4.2 * columns + 0.4, 4.0 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= shown:
            axes.set_axis_off()
            continue
        x, y = truth[:, index], given[:, index]
        span = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(span, span, color=_ink(), linewidth=1, alpha=0.6)
        axes.plot(x, y, "o", markersize=3.5, alpha=0.5, color=_colour(0), rasterized=len(x) > 5000)
        axes.set(title=visible(names[index]), xlabel="true", ylabel="predicted")
    return figure


def confusion_matrix(matrices: Mapping[str, NDArray[np.integer]], classes: Sequence[str]) -> Figure:
    """Confusion matrices side by side, each row in per cent of the true class.

    Args:
        matrices: by network, counts (classes, classes): row true class, column predicted class.
        classes: names in the order of rows and columns.
    """
    size, classes = len(classes), [visible(name) for name in classes]
    side = 5.2 if size <= MAX_LABELLED_CLASSES else 4.5
    figure = Figure(figsize=(0.9 + side * len(matrices), side + 0.6), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for index, (axes, (label, counts)) in enumerate(zip(panels, matrices.items(), strict=True)):
        totals = counts.sum(axis=1, keepdims=True)
        percent = 100 * counts / np.maximum(totals, 1)
        image = axes.imshow(percent, vmin=0, vmax=100, cmap="cividis")
        axes.grid(False)
        accuracy = 100 * np.trace(counts) / max(int(counts.sum()), 1)
        axes.set_title(f"{visible(label)}: {accuracy:.1f}% correct")
        axes.set_xlabel("predicted class")
        if size <= MAX_LABELLED_CLASSES:
            fontsize = 9.5 if size <= MAX_NUMBERED_CLASSES else 6
            axes.set_xticks(range(size), classes, rotation=45, ha="right", fontsize=fontsize)
            axes.set_yticks(range(size), classes if index == 0 else [""] * size, fontsize=fontsize)
        if index == 0:
            axes.set_ylabel("true class")
        if size <= MAX_NUMBERED_CLASSES:
            _number_cells(axes, percent)
    figure.colorbar(image, ax=list(panels), label="% of the true class", shrink=0.8, aspect=30)
    return figure


def _number_cells(axes: Axes, percent: NDArray[np.float64]) -> None:
    """Write each cell's percentage; cells under half a per cent stay empty."""
    for row, column in np.argwhere(percent > 0.5):
        value = percent[row, column]
        ink = "black" if value > 60 else "white"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=8.5)


def shown_layers(gates: Gates) -> list[str]:
    """The layers that `gates_per_stage` draws: the last of each stage, all of the last stage.

    This is the choice of fig. 6 of the paper (SE_2_3, SE_3_4, SE_4_6, SE_5_1, SE_5_2, SE_5_3).
    A stage is what shares the first part of a layer's dotted name.
    """
    stages: dict[str, list[str]] = {}
    for name in gates:
        stages.setdefault(name.split(".")[0], []).append(name)
    *early, last = stages.values()
    return [layers[-1] for layers in early] + last


def neutral_gate(gate: str) -> float | None:
    """The value of a gate that leaves a channel unchanged, if the gate can lie on both sides."""
    return 1.0 if gate in ("identity_sigmoid", "relu") else None


def gates_per_stage(
    gates: Gates, classes: Sequence[str], *, neutral: float | None = None
) -> Figure:
    """Mean gate of every channel, by class, in the style of fig. 6 and 7 of the paper.

    Args:
        gates: by layer in the network's order, mean gates (classes, channels).
        classes: names of the rows.
        neutral: gate value that leaves a channel unchanged, drawn as a line where it lies inside
            the range of the gates.

    Returns:
        A panel a layer (see `shown_layers`); up to four classes, spread evenly over the list, and
        the mean over all classes.
    """
    layers = shown_layers(gates)
    count = min(MAX_GATE_CLASSES, len(classes))
    picked = np.unique(np.linspace(0, len(classes) - 1, count).round().astype(int))

    def draw(axes: Axes, name: str) -> None:
        values = gates[name]
        channels = np.arange(values.shape[1])
        if neutral is not None:
            axes.axhline(
                neutral, color=_ink(), linewidth=0.8, alpha=0.6, label=f"{neutral:g}: unchanged"
            )
        axes.plot(
            channels,
            values.mean(axis=0),
            color=_ink(),
            linewidth=4.5,
            alpha=0.25,
            label=f"mean of all {len(classes)} classes",
        )
        for index, row in enumerate(picked):
            axes.plot(
                channels,
                values[row],
                color=_colour(index),
                linestyle=DASHES[index],
                linewidth=1.4,
                label=_label(classes[row]),
            )
        spread = values.std(axis=0).mean()
        title = f"{visible(name.removesuffix('.se'))}\nspread between classes {spread:.3f}"
        axes.set_title(title, fontsize=10.5)

    return _panels(layers, "mean gate", draw)


def gates_spread(means: Gates, spreads: Gates, classes: Sequence[str]) -> Figure:
    """Mean gates of some classes, with the spread within each, in the style of fig. 7 of the paper.

    Args:
        means: by layer, mean gates (classes, channels).
        spreads: likewise, their standard deviation over the images of the class.
        classes: names of the rows, up to six.

    Returns:
        A panel a layer.
    """

    def draw(axes: Axes, name: str) -> None:
        channels = np.arange(means[name].shape[1])
        for index, (mean, std) in enumerate(zip(means[name], spreads[name], strict=True)):
            style, label = DASHES[index], _label(classes[index])
            (line,) = axes.plot(channels, mean, linestyle=style, linewidth=1.4, label=label)
            axes.fill_between(channels, mean - std, mean + std, alpha=0.2, color=line.get_color())
        axes.set_title(visible(name.removesuffix(".se")), fontsize=10.5)

    return _panels(list(means), "mean gate ± spread", draw)


def _panels(layers: Sequence[str], label: str, draw: Callable[[Axes, str], None]) -> Figure:
    """A panel a layer over its channels, three in a row, with one legend."""
    columns = min(len(layers), 3)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3.5 * columns + 0.6, 2.9 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, name in zip(panels.flat, layers, strict=False):
        draw(axes, name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.margins(x=0.02)
    for axes in panels.flat[len(layers) :]:
        axes.set_axis_off()
    for axes in panels[-1]:
        axes.set_xlabel("channel")
    for axes in panels[:, 0]:
        axes.set_ylabel(label)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    return figure


def render(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The figure as the bytes of a PNG (150 dots an inch) or of an SVG without a date."""
    find_letters(figure)
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # one a letter; said above
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def save_figure(figure: Figure, folder: Path, name: str) -> bytes:
    """Write `folder/name.png` and `folder/name.svg`, each as a whole; makes the folder.

    Returns:
        The SVG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{name}.png", render(figure, "png"))
    svg = render(figure, "svg")
    atomic_write(folder / f"{name}.svg", svg)
    return svg
