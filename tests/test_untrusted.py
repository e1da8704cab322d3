"""Files from anywhere: damaged at random or on purpose, they end in one line and run nothing.

Hypothesis draws the damage; SENET_FUZZ_EXAMPLES sets how often (`make soak` sets it high).
"""

import ast
import contextlib
import functools
import io
import json
import os
import pickle
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import senet
from senet import create_model
from senet.checkpoint.files import open_checkpoint, rebuild
from senet.data import Preprocessing
from senet.data.images import FORMATS, decode_image, load_image, read_header
from senet.data.shards.index import Shard, ShardIndex, Table
from senet.errors import SenetError, UserError
from senet.experiments.compare import CompareConfig
from senet.networks.anywhere import open_source
from senet.training.config import RunConfig
from senet.training.recipe import get_recipe
from senet.weights import read_state_dict

EXAMPLES = int(os.environ.get("SENET_FUZZ_EXAMPLES", "60"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SENET_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
KINDS = (
    "jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm", "avif", "jpeg2000", "ico", "tga", "pcx",
    "sgi", "qoi",
)  # fmt: skip
# Where and to which value bytes are changed, where the file is cut, what is put in.
damage = st.tuples(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    st.floats(0, 1),
    st.binary(max_size=8),
)


def damaged(whole: bytes, how: tuple[list[tuple[float, int]], float, bytes]) -> bytes:
    changes, cut, inserted = how
    content = bytearray(whole)
    for place, value in changes:
        content[min(int(place * len(content)), len(content) - 1)] = value
    keep = len(content) if cut > 0.7 else int(cut / 0.7 * len(content))
    return bytes(content[:keep] + inserted + content[keep:] if cut > 0.7 else content[:keep])


def check(error: SenetError, start: str) -> None:
    """The command line makes one line of it; it tells at its start what is meant."""
    assert str(error).startswith(start)
    assert str(error).strip()


@functools.cache
def picture(format: str) -> bytes:
    buffer = io.BytesIO()
    gradient = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    gradient.save(buffer, format)
    return buffer.getvalue()


@fuzzed
@given(format=st.sampled_from(KINDS), how=damage, channels=st.sampled_from([1, 3]))
def test_damaged_images(
    format: str, how: tuple[list[tuple[float, int]], float, bytes], channels: int
) -> None:
    try:
        image = decode_image(damaged(picture(format), how), "x", channels)
    except UserError as error:
        check(error, "cannot read the image 'x': ")
    else:
        assert image.mode == {1: "L", 3: "RGB"}[channels]


@fuzzed
@given(content=st.binary(max_size=200), channels=st.sampled_from([1, 3]))
def test_any_bytes_as_image(content: bytes, channels: int) -> None:
    try:
        decode_image(content, "x", channels)
    except UserError as error:
        check(error, "cannot read the image 'x': ")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
DOS = struct.pack("<4sIIIIII", b"\xc5\xd0\xd3\xc6", 32, len(POSTSCRIPT), 0, 0, 0, 0) + bytes(4)


@pytest.mark.parametrize("content", [POSTSCRIPT, DOS + POSTSCRIPT], ids=["PostScript", "DOS EPS"])
def test_an_image_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """Pillow alone would start `gs` for PostScript, whatever the file is called."""
    program, started = tmp_path / "gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not yet looked for
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for read in (
        lambda: decode_image(content, "x", 3),
        lambda: decode_image(content, "x", 3, "turbo"),
        lambda: load_image(path, 3),
        lambda: read_header(path),
        lambda: read_header(content),
    ):
        with pytest.raises(UserError, match="not an image in a format that is read"):
            read()
    assert not started.exists()
    with Image.open(path) as image, contextlib.suppress(OSError):
        image.load()  # the file would have done it
    assert started.exists()


def test_images_are_opened_in_one_place() -> None:
    """`Image.open` without a list of decoders must not come in by another door."""
    calls = [
        path.name
        for path in Path(senet.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "open"
        if isinstance(node.value, ast.Name) and node.value.id in ("Image", "PIL")
    ]
    assert calls == ["images.py"]
    assert not {"EPS", "PSD", "WMF", "FPX", "MIC", "HDF5", "GRIB", "BUFR"} & set(FORMATS)


OTHERS = (
    b"%!PS", b"%PDF-1.4", b"\x89HDF\r\n\x1a\n", b"8BPS\0\1", b"GRIB", b"BUFR",
    b"\xd7\xcd\xc6\x9a\0\0", b"\0\0\1\xb3", b"icns",
)  # fmt: skip


@fuzzed
@given(magic=st.sampled_from(OTHERS), content=st.binary(max_size=200))
def test_what_other_decoders_would_take(magic: bytes, content: bytes) -> None:
    try:
        decode_image(magic + content, "x", 3)
    except UserError as error:
        check(error, "cannot read the image 'x': ")


@functools.cache
def checkpoint_bytes(ending: str) -> bytes:
    model = create_model("se_resnet8_cifar", num_classes=3)
    model.preprocessing = Preprocessing(8, 8, (0.5,) * 3, (0.5,) * 3).to_dict()
    with tempfile.TemporaryDirectory() as folder:
        if ending == "safetensors":
            model.save_pretrained(folder)
            return (Path(folder) / "model.safetensors").read_bytes()
        torch.save(model.state_dict(), Path(folder) / "x.pth")
        return (Path(folder) / "x.pth").read_bytes()


@fuzzed
@given(ending=st.sampled_from(["safetensors", "pth"]), how=damage, early=st.booleans())
def test_damaged_checkpoints(
    ending: str, how: tuple[list[tuple[float, int]], float, bytes], early: bool
) -> None:
    if early:  # the header is a small part of the file, and the interesting one
        how = ([(place / 100, value) for place, value in how[0]], how[1], how[2])
    content = damaged(checkpoint_bytes(ending), how)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{ending}"
        path.write_bytes(content)
        try:
            if ending == "safetensors":
                open_checkpoint(path)
            else:
                read_state_dict(path)
        except SenetError as error:
            check(error, "")


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
flat = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=5), plain, max_size=3)
JSON = flat | st.lists(flat, max_size=3)
INDEX: dict[str, Any] = {
    "version": 1,
    "name": "x",
    "classes": ["a", "b"],
    "preprocessing": Preprocessing(8, 8, (0.5,) * 3, (0.5,) * 3).to_dict(),
    "shards": [vars(Shard("train-000000.tar", "train", 2, 4096, "0" * 64, "0" * 64))],
}


@fuzzed
@given(key=st.sampled_from(sorted(INDEX)), value=JSON, inner=st.booleans())
def test_any_index(key: str, value: Any, inner: bool) -> None:
    values = json.loads(json.dumps(INDEX))
    if inner and key == "shards":
        values["shards"][0]["images"] = value
    elif inner and key == "preprocessing":
        values["preprocessing"]["mean"] = value
    else:
        values[key] = value
    try:
        ShardIndex.from_json(json.dumps(values), "index.json")
    except UserError as error:
        check(error, "index.json")


@fuzzed
@given(key=st.sampled_from(["offsets", "sizes", "labels", "crc32"]), value=JSON)
def test_any_table(key: str, value: Any) -> None:
    values = {"offsets": [512, 2048], "sizes": [9, 9], "labels": [0, 1], "crc32": [1, 2]}
    shard = Shard(**INDEX["shards"][0])
    Table.from_json(json.dumps(values).encode(), shard, 2, "x.json")
    try:
        Table.from_json(json.dumps({**values, key: value}).encode(), shard, 2, "x.json")
    except UserError as error:
        check(error, "x.json")


@fuzzed
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_config(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.toml"):
            RunConfig.from_toml(path)


def header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "content",
    [
        header(2**63, b"{}"),
        header(2**40, b"{}"),
        header(99_000_000, b"{}"),
        header(2, b"{}") + bytes(10),
        header(4, b"[[]]"),
        header(60, b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4]}}'[:60]),
        header(63, b'{"a":{"dtype":"F32","shape":[999999999],"data_offsets":[0,4]}} ') + bytes(4),
        header(100_000, b"[" * 100_000),
    ],
    ids=["2^63", "2^40", "99 MB", "trailing", "a list", "cut", "a huge shape", "deep"],
)
def test_safetensors_header_bombs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """None takes memory for what a header promises."""
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(content)
    outcome = run(capsys, "evaluate", path, "--data", "embedded")
    outcome.refused("evaluate", "bomb.safetensors")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("format", ["pickle", "torch", "legacy torch"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, format: str) -> None:
    target, path = tmp_path / "was-here", tmp_path / "evil.pth"
    content = {"fc.weight": torch.zeros(2), "x": Evil(target)}
    if format == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=format == "torch")
    with pytest.raises(UserError, match=r"evil\.pth cannot be read"):
        read_state_dict(path)
    assert not target.exists()
    if format == "pickle":
        pickle.loads(path.read_bytes())  # the file would have done it
        assert target.exists()


def test_a_checkpoint_does_not_run_a_file_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's checkpoint may lie beside a stranger's program."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SENET_TRUST_CODE", raising=False)
    program, target = tmp_path / "net.py", tmp_path / "was-here"
    program.write_text(
        f"import pathlib, torch\npathlib.Path({str(target)!r}).touch()\n"
        "def make(num_classes): return torch.nn.Linear(3, num_classes)\n"
    )
    name = f"{program}:make"
    config = {"name": name, "num_classes": 2, "in_channels": 3, "options": {}}
    with pytest.raises(UserError, match=r"wants to run .*net\.py, which you have not named"):
        rebuild(config)
    assert not target.exists()
    open_source(name, num_classes=2)  # the user names it
    target.unlink()
    assert isinstance(rebuild(config), torch.nn.Linear)
    program.write_text(program.read_text() + "# changed\n")
    with pytest.raises(UserError, match="SENET_TRUST_CODE=1"):
        rebuild(config)
    monkeypatch.setenv("SENET_TRUST_CODE", "1")
    rebuild(config)


@pytest.mark.parametrize("how", ["train", "compare", "config"])
def test_a_config_does_not_run_a_file_that_it_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    """Nor does a stranger's config.toml, which is data; the user's own runs go on unasked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SENET_TRUST_CODE", raising=False)
    program, target, folder = tmp_path / "net.py", tmp_path / "was-here", tmp_path / "run"
    program.write_text(
        f"import pathlib, torch\npathlib.Path({str(target)!r}).touch()\n"
        "def make(num_classes): return torch.nn.Linear(3, num_classes)\n"
    )
    name, config = f"{program}:make", folder / "config.toml"
    folder.mkdir()
    recipe = get_recipe("quick", epochs=2)
    if how == "compare":
        config.write_text(CompareConfig(out=folder, model=name, data="absent").to_toml())
    else:
        RunConfig(model=name, data="absent", recipe=recipe, out=folder).to_toml(config)
    flags: list[object] = ["--resume", folder]
    if how == "config":
        flags = ["--config", config, "--out", tmp_path / "new"]
    command = "compare" if how == "compare" else "train"
    words = "wants to run", f"{program}, which you have not named before", "SENET_TRUST_CODE=1"
    run(capsys, command, *flags).refused(command, str(config), *words)
    assert not target.exists()
    assert not (tmp_path / "cache").exists()
    if how != "compare":  # which takes no option beside --resume
        named = run(capsys, command, *flags, "--model", name)
        named.refused(command, "unknown data set 'absent'")
        assert target.exists()
    else:
        open_source(name, num_classes=2)
    run(capsys, command, *flags).refused(command, "unknown data set 'absent'")


def test_an_image_of_many_pixels_in_few_bytes() -> None:
    """16 GB of pixels in 100 bytes: refused by its header."""
    size = struct.pack(">IIBBBBB", 65_000, 65_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0"))
    assert len(bomb) < 100
    with pytest.raises(UserError, match="decompression bomb"):
        decode_image(bomb, "bomb.png", 3)
