"""Shards: what is written is what is read, wherever it was stopped, and broken ones are named."""

import http.server
import io
import json
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from senet.data import (
    Augmentation,
    BadImageError,
    load_data,
    train_loader,
    val_loader,
)
from senet.data.shards import write as writing
from senet.data.shards.index import Shard, ShardIndex
from senet.data.shards.write import size_in_bytes, write_shards
from senet.data.sources import files
from senet.errors import UserError

MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images that stay files: 60 for training and 9 for evaluation, of three classes."""
    monkeypatch.setattr(files, "CHECKED_LIMIT", 0)
    names = ("cat", "dog", "eel")
    return make_folder({"train": dict.fromkeys(names, 20), "val": dict.fromkeys(names, 3)})


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    write_shards(load_data(str(folder), image_size=8), tmp_path / "shards", shard_size=24_000)
    return tmp_path / "shards"


def opened(place: Path | str, **options: Any) -> Any:
    return load_data(f"shards:{place}", **options)


def collect(loader: Any) -> list[tuple[Tensor, Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_all_images_and_classes_are_there(folder: Path, shards: Path) -> None:
    before, after = load_data(str(folder), image_size=8), opened(shards)
    assert after.classes == before.classes
    assert after.preprocessing == before.preprocessing
    assert len({path.name for path in shards.glob("train-*.tar")}) >= 4
    assert all(path.stat().st_size <= 24_000 for path in shards.glob("*.tar"))
    for split in ("train", "val"):
        a, b = getattr(before, split), getattr(after, split)
        pictures = [sorted((x.tobytes(), y) for x, y in (each[i] for i in range(len(each))))
                    for each in (a, b)]  # fmt: skip
        assert pictures[0] == pictures[1]
    options = {"batch_size": 4, "num_workers": 0}
    assert same(collect(val_loader(before, **options)), collect(val_loader(after, **options)))


def test_webdataset_reads_them(shards: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset

        paths = [str(path) for path in sorted(shards.glob("train-*.tar"))]
        samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    data = opened(shards)
    assert len(samples) == len(data.train) == 60
    for index, sample in enumerate(samples):
        image, label = data.train[index]
        assert int(sample["cls"]) == label
        assert Image.open(io.BytesIO(sample["png"])).tobytes() == image.tobytes()


def test_images_in_memory_lose_nothing(tmp_path: Path, make_folder: MakeFolder) -> None:
    data = load_data(str(make_folder({"train": {"a": 5, "b": 5}, "val": {"a": 2, "b": 2}})))
    write_shards(data, tmp_path / "out", shard_size=2000, workers=3)
    again = opened(tmp_path / "out")
    before = sorted((data.train[i][0].tobytes(), data.train[i][1]) for i in range(10))
    assert sorted((again.train[i][0].tobytes(), again.train[i][1]) for i in range(10)) == before


def test_stopped_writing_goes_on(
    folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out, inner = load_data(str(folder), image_size=8), tmp_path / "again", writing._write
    calls = []

    def failing(*arguments: Any) -> Shard:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return inner(*arguments)

    monkeypatch.setattr(writing, "_write", failing)
    with pytest.raises(OSError, match="No space"):
        write_shards(data, out, shard_size=24_000)
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"cannot read .*index\.json: No such file"):
        opened(out)
    monkeypatch.undo()
    monkeypatch.setattr(files, "CHECKED_LIMIT", 0)
    (out / "train-000001.tar").write_bytes(b"half")
    done = write_shards(data, out, shard_size=24_000)
    # The first is kept, the broken one is not; one more may have been under way.
    assert 9 <= done.written < len(done.index.shards) == 12
    for path in shards.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert write_shards(data, out, shard_size=24_000).written == 0
    with pytest.raises(UserError, match="holds shards of other images, or of another seed"):
        write_shards(data, out, shard_size=30_000)
    with pytest.raises(UserError, match="is not empty and holds no shards"):
        write_shards(data, folder, shard_size=24_000)


@pytest.mark.parametrize("content", [b'{"bytes": 2', b"[]", b"{}", b"\xff"])
def test_a_shard_whose_index_is_cut_off_is_written_anew(
    folder: Path, shards: Path, content: bytes
) -> None:
    beside = shards / "train-000001.json"
    before = beside.read_bytes()
    beside.write_bytes(content)
    done = write_shards(load_data(str(folder), image_size=8), shards, shard_size=24_000)
    assert (done.written, beside.read_bytes()) == (1, before)


@pytest.mark.parametrize("limit", [0, 2**20])  # the images stay files, or come as pixels
def test_other_images_of_the_same_names_are_refused(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(files, "CHECKED_LIMIT", limit)
    folder = make_folder({"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 2}})
    for times in (1, 0):
        done = write_shards(load_data(str(folder)), tmp_path / "out", shard_size=2000)
        assert (done.written > 0) == times
    image = next((folder / "train" / "a").iterdir())
    with Image.open(image) as former:
        size = former.size
    Image.new("RGB", size, (1, 2, 3)).save(image)
    with pytest.raises(UserError, match="holds shards of other images"):
        write_shards(load_data(str(folder)), tmp_path / "out", shard_size=2000)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_bad_seeds(folder: Path, tmp_path: Path, seed: int) -> None:
    with pytest.raises(UserError, match=rf"seed must be .*, got {seed}"):
        write_shards(load_data(str(folder)), tmp_path / "out", shard_size=24_000, seed=seed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("buffer", [1, 7, 25, 1000])
def test_an_epoch_takes_each_image_once_a_few_shards_at_a_time(shards: Path, buffer: int) -> None:
    data = opened(shards, shuffle_buffer=buffer)
    orders = [data.train.epoch_order(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert sorted(orders[0].tolist()) == list(range(60))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    if buffer < 60:
        most = max(shard.images for shard in data.train.shards)
        numbers = torch.bucketize(orders[0], torch.from_numpy(data.train.starts), right=True)
        for start in range(0, 60, buffer):
            touched = set(numbers[start : start + buffer].tolist())
            assert len(touched) <= buffer // min(s.images for s in data.train.shards) + 2, most


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_an_epoch_and_resume_in_it(shards: Path, workers: int) -> None:
    data = opened(shards, shuffle_buffer=10)
    augmentation = Augmentation(crop="padded", padding=1, flip=True)
    options = {"batch_size": 3, "seed": 5, "num_workers": workers}

    def loader(**more: int) -> Any:
        return train_loader(data, augmentation, **options, **more)

    ranks = [collect(loader(rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [10, 10]
    whole = loader()
    seen, state = [], {}
    for step, batch in enumerate(whole):
        seen.append((batch[0].clone(), batch[1].clone()))
        if step == 6:
            state = whole.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert same(collect(resumed), seen[7:])


def test_a_range_of_shards(shards: Path) -> None:
    part = opened(f"{shards}/train-{{000001..000002}}.tar")
    whole = opened(shards)
    assert len(part.train) == sum(shard.images for shard in whole.train.shards[1:3])
    assert len(part.val) == len(whole.val)
    with pytest.raises(UserError, match=r"no training shard 'train-000099\.tar'"):
        opened(f"{shards}/train-{{000099..000100}}.tar")
    with pytest.raises(UserError, match="must rise"):
        opened(f"{shards}/train-{{000002..000001}}.tar")


def test_a_broken_shard_is_named_or_skipped(shards: Path) -> None:
    broken = shards / "train-000001.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"broken shard .*train-000001\.tar: it has \d+ bytes"):
        opened(shards)
    changed = bytearray(whole)
    changed[600] ^= 1
    broken.write_bytes(changed)
    data = opened(shards)  # of the right size: found when it is read
    first = int(data.train.starts[1])
    with pytest.raises(BadImageError, match=r"train-000001\.tar: image 0': the shard is damaged"):
        data.train[first]
    with pytest.warns(UserWarning, match=r"train-000001\.tar: it does not match its SHA-256"):
        skipping = opened(shards, bad_shards="skip")
    assert len(skipping.train) == 60 - data.train.shards[1].images
    assert skipping.skipped[0].startswith("broken shard ")
    assert skipping.skipped_val == ()
    broken.unlink()
    with pytest.warns(UserWarning, match="No such file"):
        without = opened(shards, bad_shards="skip")
    assert len(without.train) == len(skipping.train)


def test_a_shard_cut_short_while_it_is_read(shards: Path) -> None:
    data = opened(shards)
    last = len(data.train) - 1
    path = shards / data.train.shards[-1].name
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BadImageError, match=": the shard is cut short"):
        data.train[last]


def edited(shards: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((shards / "index.json").read_text())
    change(values)
    (shards / "index.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["shards"][0].update(name="../../etc/passwd"), "a shard is a .tar file in"),
        (lambda v: v["shards"][0].update(name="/etc/x.tar"), "a shard is a .tar file in the same"),
        (lambda v: v["shards"][0].update(images=-1), "has count -1"),
        (lambda v: v["shards"][0].update(images=10**30), "has count 1000"),
        (lambda v: v["shards"][0].update(split="x"), "split must be train or val"),
        (lambda v: v.update(version=9), "has version 9, this senet reads 1"),
        (lambda v: v.update(classes=[1]), "classes must be a list of names"),
        (lambda v: v.pop("shards"), "is no index of shards"),
        (lambda v: v["preprocessing"].update(mean=[]), "is no index of shards"),
        (lambda v: v["shards"][0].update(index_sha256="0"), r"is not the file that index\.json"),
    ],
)
def test_an_index_is_not_trusted(
    shards: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edited(shards, change)
    with pytest.raises(UserError, match=message):
        opened(shards)


def test_members_with_evil_names_are_never_unpacked(shards: Path, tmp_path: Path) -> None:
    """A shard's names and links are not used; only bytes at known places are read."""
    name = "train-000000.tar"
    data = opened(shards)
    content, _ = data.train[0]
    with tarfile.open(shards / name, "w") as tar:
        buffer = io.BytesIO()
        content.save(buffer, "png")
        member = tarfile.TarInfo("../../../escaped.png")
        member.size = buffer.tell()
        buffer.seek(0)
        tar.addfile(member, buffer)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"broken shard .*train-000000\.tar"):
        opened(shards)
    with pytest.warns(UserWarning, match="it is left out"):
        rest = opened(shards, bad_shards="skip")
    for index in range(len(rest.train)):
        rest.train[index]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path.parent / "escaped.png").exists()


@pytest.fixture
def address(shards: Path) -> Iterator[str]:
    """The shards behind an address of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(shards))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_shards_behind_an_address(address: str, shards: Path, tmp_path: Path) -> None:
    here = opened(shards)
    there = opened(address, root=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))  # fetched when used
    options = {"batch_size": 4, "seed": 0, "num_workers": 0}
    one, other = (collect(train_loader(d, Augmentation(), **options)) for d in (here, there))
    assert same(one, other)
    fetched = list((tmp_path / "cache").rglob("*.tar"))
    assert len(fetched) == len(here.train.shards)
    (shards / "val-000000.tar").write_bytes(b"other")
    with pytest.raises(BadImageError, match=r"val-000000\.tar: it has 5 bytes instead of"):
        there.val[0]


def test_options_that_do_not_belong(shards: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="shuffle_buffer is for shards:PLACE and hf-stream:NAME"):
        load_data(str(folder), shuffle_buffer=10)
    with pytest.raises(UserError, match="val_fraction is not for shards:"):
        opened(shards, val_fraction=0.5)
    with pytest.raises(UserError, match="shuffle_buffer must be at least 1 image, got 0"):
        opened(shards, shuffle_buffer=0)


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256 * 10**6), ("1GiB", 2**30), ("1.5 kb", 1500), ("4096", 4096)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1XB", "10B", "1e9", "9" * 400, "1" * 20])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="shard_size must be"):
        size_in_bytes(text)


def test_index_keeps_everything(shards: Path) -> None:
    text = (shards / "index.json").read_text()
    assert ShardIndex.from_json(text, "index.json").to_json() == text
