"""`senet bench data`: what it measures and prints. Nothing here judges a time."""

from pathlib import Path

import pytest
from cli_tools import run
from PIL import Image

from senet.bench import data as bench_data
from senet.bench import timing
from senet.errors import UserError


def test_pictures_are_photos_of_the_usual_size(tmp_path: Path) -> None:
    paths = bench_data.write_pictures(tmp_path, 2)
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
        assert 80_000 < Path(path).stat().st_size < 140_000
    assert Path(paths[0]).read_bytes() != Path(paths[1]).read_bytes()
    assert bench_data.describe(paths).startswith("2 JPEG files of ")


def test_contestants_read_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "BATCH", 2)
    paths = bench_data.write_pictures(tmp_path, 4)
    for case in bench_data.cases(paths, [0, 1]):
        assert case.divisor == 4
        contestants = case.build()
        assert [each.name for each in contestants] == ["pillow", "turbo"]
        assert [each.run() for each in contestants] == [4, 4]
    assert bench_data.cases(paths, [2])[0].divisor == 2  # a worker had half of them
    with pytest.raises(UserError, match="--workers must be 0 or more"):
        bench_data.cases(paths, [-1])


def test_values_are_an_image_and_worker() -> None:
    case = timing.Case(
        "decode", "2 workers", lambda: [timing.Contestant("pillow", lambda: None)],
        unit="ms/image", divisor=1e9,
    )  # fmt: skip
    (found,) = timing.measure(case, rounds=2, warmup=1)
    assert found.unit == "ms/image"
    assert found.quantiles[1] < 1e-6
    rows = timing.summarize("decode", "1 workers", "ms/image", {"pillow": [4.0, 2.0, 5.0]})
    assert rows[0].least == 2.0
    (line,) = bench_data.conclusions(rows)
    assert "pillow: 250 images/s a worker (median" in line
    assert "best round 500" in line


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(bench_data, "BATCH", 2)
    bench_data.write_pictures(tmp_path, 3)
    flags = ("--rounds", 2, "--warmup", 1, "--no-tune-allocator")
    found = run(capsys, "bench", "data", "--images", tmp_path, "--workers", "0,1", *flags)
    assert found.code == 0, found.err
    assert "2 JPEG files of " in found.out  # whole batches only
    assert found.out.count("images/s a worker") == 8
    run(capsys, "bench", "data", "--images", tmp_path / "none").refused("bench", "0 JPEG files")
    for wrong, word in (
        (("ops", "--workers", 1), "--workers is an option of 'data'"),
        (("train", "--images", tmp_path), "--images is an option of 'data'"),
        (("data", "--batch-sizes", 8), "'data' has none"),
        (("data", "--device", "cuda"), "leave out --device cuda"),
        (("data", "--no-compile"), "not for 'data'"),
    ):
        run(capsys, "bench", *wrong).refused("bench", word)
