"""Released weights by name: the table, and files from a Hub on the loopback address."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save
from tests.helpers.cli_tools import make_images, run
from tests.helpers.hub_server import Hub, serving
from timm.models import get_pretrained_cfg
from timm.models._registry import _deprecated_models
from torch import nn

import senet
from senet.checkpoint.files import model_for_weights, open_checkpoint, open_weights
from senet.commands.network import open_network
from senet.data import Preprocessing
from senet.errors import UserError
from senet.models.elsewhere import FORMER_TIMM_NAMES, TIMM_NAMES, split_tag
from senet.training.config import RunConfig
from senet.training.finetuning import starting_checkpoint
from senet.training.recipe import get_recipe
from senet.weights import LAYOUTS, convert, released
from senet.weights.released import all_released, find_released, released_for

# --- the table ---------------------------------------------------------------------------------


def test_the_table_says_of_each_what_timm_says() -> None:
    assert len(all_released()) == 95
    for each in all_released():
        assert each.network in senet.list_models()
        assert each.layout in LAYOUTS
        assert (each.top1 is None) == (each.top1_source is None)
        told = Preprocessing.from_dict(each.preprocessing)
        if each.layout == "bninception":  # not of timm
            continue
        cfg = get_pretrained_cfg(each.name)
        crops = {cfg.input_size[1]: cfg.crop_pct}
        if cfg.test_input_size:
            crops[cfg.test_input_size[1]] = cfg.test_crop_pct or cfg.crop_pct
        assert told.resize == int(told.image_size / crops[told.image_size]), each.name
        assert (told.mean, told.std) == (cfg.mean, cfg.std)
        assert (told.interpolation, each.licence) == (cfg.interpolation, cfg.license)
        assert each.repository == f"timm/{each.name}"
        assert each.classes == cfg.num_classes
    known = {each.name for each in all_released()}
    for theirs in TIMM_NAMES:  # all that timm has
        assert set(timm.list_pretrained(f"{theirs}.*")) <= known, theirs


def test_the_best_is_the_most_accurate_that_anybody_may_use() -> None:
    assert find_released("se_resnet50").name == "seresnet50.ra2_in1k"
    assert find_released("seresnet50").top1 == 81.288
    assert find_released("senet154").name == "legacy_senet154.in1k"
    assert find_released("resnext101_32x8d").licence == "bsd-3-clause"  # cc-by-nc has 84.3 %
    for network in {each.network for each in all_released()}:
        best, *others = released_for(network)
        assert best.commercial or not any(each.commercial for each in others)


@pytest.mark.parametrize(
    ("name", "tag", "found"),
    [
        ("se_resnet50", "a1_in1k", "seresnet50.a1_in1k"),
        ("se_resnet50", "in1k", "legacy_seresnet50.in1k"),
        ("se_resnet50.ra2_in1k", None, "seresnet50.ra2_in1k"),
        ("seresnet50.ra2_in1k", "ra2_in1k", "seresnet50.ra2_in1k"),
        ("legacy_seresnet50", None, "legacy_seresnet50.in1k"),
        ("senet154", "senet154.gluon_in1k", "senet154.gluon_in1k"),
        ("gluon_senet154", None, "senet154.gluon_in1k"),
        ("ig_resnext101_32x8d", None, "resnext101_32x8d.fb_wsl_ig1b_ft_in1k"),
    ],
)
def test_names_and_tags(name: str, tag: str | None, found: str) -> None:
    assert find_released(name, tag).name == found


@pytest.mark.parametrize(
    ("name", "tag", "said"),
    [
        ("se_resnet50", "a9", "has no released weights 'a9'; it has ra2_in1k, a1_in1k"),
        ("seresnet50", "in1k", "no released weights 'in1k'"),  # that is legacy_seresnet50
        ("se_resnet50.a1_in1k", "ra2_in1k", "says a1_in1k and pretrained says ra2_in1k"),
        ("seresnet101", None, "no released weights of se_resnet101 are known"),
        ("mobilenet", None, r"no released weights of mobilenet .*pretrained=.hf_hub:"),
    ],
)
def test_weights_that_are_not_there(name: str, tag: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        senet.create_model(name, pretrained=tag or True)


def test_former_names_of_timm_are_those_it_still_takes() -> None:
    for former, now in FORMER_TIMM_NAMES.items():
        assert find_released(former).name == now
        assert _deprecated_models[former] == now


def peer_and_ours(theirs: str, device: str) -> tuple[nn.Module, nn.Module]:
    ours = TIMM_NAMES[theirs]
    with torch.device(device):
        return timm.create_model(theirs), senet.create_model(ours.name, **ours.options)


@pytest.mark.parametrize("theirs", ["legacy_seresnet18", "seresnet18", "vgg16_bn"])
def test_structures_are_those_of_timm(theirs: str) -> None:
    """Names and shapes alone; all of them, with their outputs, in the test below."""
    peer, model = peer_and_ours(theirs, "meta")
    report = senet.load_weights(model, peer.state_dict())
    assert (report.changed, report.dropped, report.kept) == ({}, (), ())
    assert {each.layout for each in all_released() if each.name.startswith(f"{theirs}.")} <= {
        report.layout
    }


@pytest.mark.soak
@pytest.mark.parametrize("theirs", TIMM_NAMES)
def test_every_network_computes_what_timms_does(theirs: str) -> None:
    torch.manual_seed(0)
    peer, model = peer_and_ours(theirs, "cpu")
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.1, 0.3)  # or 50 blocks make chaos of any rounding
    report = senet.load_weights(model, peer.state_dict())
    assert (report.changed, report.dropped, report.kept) == ({}, (), ())
    assert {e.layout for e in all_released() if e.name.startswith(f"{theirs}.")} <= {report.layout}
    x = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        expected, found = peer.eval().double()(x), model.eval().double()(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item())


@pytest.mark.soak
@pytest.mark.parametrize(
    "name", sorted({each.network for each in all_released() if each.tag.startswith("tv")})
)
def test_torchvisions_own_files_load_too(name: str) -> None:
    """Of the weights that are on the Hub as timm/….tv_in1k the original files, by structure."""
    torch.manual_seed(0)
    # torchvision's own initialisation of Inception takes a minute.
    fresh = {"init_weights": False, "transform_input": False} if name == "inception_v3" else {}
    peer = torchvision.models.get_model(name, weights=None, **fresh).eval()
    model = senet.create_model(name).eval()
    report = senet.load_weights(model, peer.state_dict())
    assert (report.changed, report.kept) == ({}, ())
    assert all(name.startswith("AuxLogits.") for name in report.dropped)
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        expected, found = peer(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_tags_of_foreign_networks_are_their_own(tmp_path: Path) -> None:
    """`timm:NAME.TAG` and `FILE.py:FUNCTION` have dots too."""
    code = tmp_path / "mine.py"
    code.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(2, 3))\n")
    name = f"{code}:net"
    assert split_tag(name) == (name, {}, None, None)
    assert split_tag("timm:resnet50.a1_in1k").tag is None
    file = tmp_path / "mine.safetensors"
    file.write_bytes(save({"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3)}))
    model = model_for_weights(name, file)
    assert torch.equal(model[0].weight, torch.ones(3, 2))  # type: ignore[index]


# --- the Hub -----------------------------------------------------------------------------------

NETWORK = "se_resnet8_cifar"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with weights of a small network, an empty cache, and a table that says so."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    rows = ["name,network,repository,url,layout,classes,image_size,crop_pct,interpolation,mean,std"]
    rows[0] += ",licence,top1,top1_source"
    for tag, size, top1 in (("other", 48, 80.0), ("good", 32, 90.0)):
        place = f"timm/small.{tag},https://example.org/{tag}.pth"
        told = f"senet,1000,{size},1,bicubic,0.25 0.5 0.75,0.2 0.2 0.2,apache-2.0,{top1}"
        rows.append(f"{NETWORK}.{tag},{NETWORK},{place},{told},https://example.org/table")
    table = tmp_path / "released.csv"
    table.write_text("\n".join(rows))
    monkeypatch.setattr(released, "_TABLE", table)
    all_released.cache_clear()
    with serving() as server:
        for number, each in enumerate(all_released()):
            torch.manual_seed(number)
            weights = save(senet.create_model(NETWORK).state_dict())
            server.files[f"{each.repository}/model.safetensors"] = weights
        constants = "huggingface_hub.constants."
        monkeypatch.setattr(f"{constants}ENDPOINT", server.address)
        monkeypatch.setattr(
            f"{constants}HUGGINGFACE_CO_URL_TEMPLATE",
            server.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(f"{constants}HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(f"{constants}DOWNLOAD_CHUNK_SIZE", 1 << 14)
        yield server
    all_released.cache_clear()


def parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def made(number: int, **options: object) -> nn.Module:
    torch.manual_seed(number)
    return senet.create_model(NETWORK, **options)  # type: ignore[no-any-return,call-overload]


def downloads(hub: Hub) -> list[str | None]:
    return [
        asked for method, path, asked in hub.requests if method == "GET" and "/resolve/" in path
    ]


def test_pretrained_takes_the_best_weights_and_their_preprocessing(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "senet")
    model = senet.create_model(NETWORK, pretrained=True)
    assert torch.equal(parameters(model), parameters(made(0)))
    assert model.preprocessing is not None
    assert model.preprocessing["mean"] == [0.25, 0.5, 0.75]
    assert f"{NETWORK}.good: " in caplog.text
    assert len(downloads(hub)) == 1
    again = senet.create_model(NETWORK, pretrained="good")  # from the cache
    assert torch.equal(parameters(again), parameters(model))
    assert len(downloads(hub)) == 1
    other = senet.create_model(f"{NETWORK}.other", pretrained=True)
    assert torch.equal(parameters(other), parameters(made(1)))
    assert other.preprocessing is not None
    assert other.preprocessing["image_size"] == 48


@pytest.mark.usefixtures("hub")
def test_a_name_with_a_tag_and_no_weights_says_how_images_are_prepared(tmp_path: Path) -> None:
    model = senet.create_model(f"{NETWORK}.other")
    assert model.preprocessing is not None
    assert model.preprocessing["image_size"] == 48
    file = tmp_path / "mine.safetensors"
    file.write_bytes(save(made(7).state_dict()))
    own = senet.create_model(f"{NETWORK}.other", pretrained=file)
    assert torch.equal(parameters(own), parameters(made(7)))
    assert own.preprocessing == model.preprocessing


@pytest.mark.usefixtures("hub")
def test_other_classes_and_channels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "senet")
    model = senet.create_model(NETWORK, pretrained=True, num_classes=7, in_channels=1)
    assert "fc is new, for 7 classes" in caplog.text
    whole = made(0)
    assert model.fc.weight.shape == (7, 64)  # type: ignore[union-attr]
    torch.testing.assert_close(
        model.conv1.weight,  # type: ignore[union-attr]
        whole.conv1.weight.sum(1, keepdim=True),  # type: ignore[union-attr]
    )
    assert model.preprocessing is not None
    assert (model.preprocessing["mean"], model.preprocessing["channels"]) == ([0.5], 1)
    pooled = senet.create_model(NETWORK, pretrained=True, num_classes=0)
    assert pooled.num_classes == 0
    with pytest.raises(UserError, match=r"weights of a network with gate='sigmoid', not 'tanh'"):
        senet.create_model(NETWORK, pretrained=True, gate="tanh")


def test_a_download_that_breaks_off_is_gone_on_with(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.breaks = 1
    model = senet.create_model(NETWORK, pretrained=True)
    assert torch.equal(parameters(model), parameters(made(0)))
    first, second = downloads(hub)
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) > 0
    assert "rying to resume" not in capfd.readouterr().err


def test_a_download_that_never_ends_fails_in_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.breaks = 1000
    with pytest.raises(UserError, match=r"cannot fetch model\.safetensors of timm/small") as said:
        senet.create_model(NETWORK, pretrained=True)
    assert "\n" not in str(said.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.breaks = 0
    assert senet.create_model(NETWORK, pretrained=True)


def test_another_checksum_is_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.damaged = True
    with pytest.raises(
        UserError, match=r"small\.good is damaged \(its SHA-256.*fetch http"
    ) as said:
        senet.create_model(NETWORK, pretrained=True)
    assert "\n" not in str(said.value)
    hub.damaged = False
    assert senet.create_model(NETWORK, pretrained=True)
    assert len(downloads(hub)) == 2
    # A file that is damaged on this machine's disk is no better.
    (blob,) = (path for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file())
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="SHA-256"):
        senet.create_model(NETWORK, pretrained=True)
    assert not blob.exists()


def test_without_a_network_one_line_says_what_to_fetch(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files.clear()
    with pytest.raises(UserError, match=r"404.*Not Found.*; fetch http\S+/timm/small\.good/") as no:
        senet.create_model(NETWORK, pretrained=True)
    assert "\n" not in str(no.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    asked = len(hub.requests)
    with pytest.raises(UserError, match="offline") as said:
        senet.create_model(NETWORK, pretrained=True)
    assert time.monotonic() - began < 5
    assert len(hub.requests) == asked
    for part in (
        f"fetch {hub.address}/timm/small.good/resolve/main/model.safetensors",
        "(or https://example.org/good.pth)",
        f'create_model("{NETWORK}.good", pretrained=FILE), or --model {NETWORK}.good',
    ):
        assert part in str(said.value)
    assert "\n" not in str(said.value)


def test_offline_takes_what_the_cache_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    senet.create_model(NETWORK, pretrained=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    model = senet.create_model(NETWORK, pretrained=True)
    assert torch.equal(parameters(model), parameters(made(0)))
    assert len(hub.requests) == asked


def test_weights_that_are_not_on_the_hub() -> None:
    with pytest.raises(
        UserError, match=r"is not on the Hub: fetch http://data.*52deb4733\.pth and"
    ):
        senet.create_model("bn_inception", pretrained=True)


@pytest.mark.usefixtures("hub")
def test_commands_take_pretrained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = make_images(tmp_path / "data", each=1) / "red" / "0.png"
    done = run(capsys, "predict", "pretrained:good", image, "--model", NETWORK, "--csv")
    assert done.code == 0, done
    assert done.out.splitlines()[0] == "image,rank,class,probability"
    listed = run(capsys, "models", NETWORK, "--pretrained")
    assert "timm/small.good" in listed.out
    assert "90.00" in listed.out
    run(capsys, "predict", "pretrained", image).refused("predict", "--model")
    told = run(capsys, "predict", "--pretrained", image, "--model", NETWORK)
    assert "Here that is the word pretrained" in told.err


@pytest.mark.usefixtures("hub")
def test_training_starts_from_pretrained(tmp_path: Path) -> None:
    config = RunConfig(
        model=f"{NETWORK}.other",
        data="embedded",
        recipe=get_recipe("finetune"),
        init="pretrained",
        out=tmp_path / "run",
    )
    start = starting_checkpoint(config.in_place())
    assert torch.equal(parameters(start.model), parameters(made(1)))
    assert start.preprocessing is not None
    assert start.preprocessing.image_size == 48
    assert start.model.config["name"] == NETWORK


@pytest.mark.usefixtures("hub")
def test_pretrained_in_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    opened = open_weights(NETWORK, Path("pretrained"))
    assert opened.preprocessing.mean == (0.25, 0.5, 0.75)
    assert opened.classes[:2] == ("tench", "goldfish")
    assert opened.model.classes is None  # a data set may call them by other names
    other = open_weights(NETWORK, "pretrained:other")
    assert other.preprocessing.image_size == 48
    assert open_weights(f"{NETWORK}.other", "pretrained").preprocessing == other.preprocessing
    network = open_network(NETWORK, Path("pretrained"), image_size=40)  # insert, optimize, explain
    assert network.preprocessing.image_size == 40
    assert network.preprocessing.mean == (0.25, 0.5, 0.75)
    assert torch.equal(parameters(network.model), parameters(made(0)))
    file = tmp_path / "mine.safetensors"
    file.write_bytes(save(made(7).state_dict()))
    for opened in (open_weights(f"{NETWORK}.other", file), open_network(f"{NETWORK}.other", file)):
        assert torch.equal(parameters(opened.model), parameters(made(7)))
        assert opened.preprocessing == other.preprocessing
    with pytest.raises(UserError, match=r"are for 1000 classes, not 3: .*--init pretrained"):
        open_network(NETWORK, Path("pretrained"), num_classes=3)
    with pytest.raises(UserError, match="which do not say of which network: give --model"):
        open_checkpoint("pretrained")


@pytest.mark.soak  # 50 MB, and the imports of a process
def test_predict_with_released_weights_of_a_hub_elsewhere(tmp_path: Path) -> None:
    """The command as users run it: HF_ENDPOINT, HF_HOME, and timm's own file and names."""
    from PIL import Image

    image = tmp_path / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(image)
    with serving() as server:
        weights = convert(senet.create_model("legacy_seresnet18"), "timm")
        server.files["timm/legacy_seresnet18.in1k/model.safetensors"] = save(weights)
        model = ("--model", "se_resnet18")
        done = subprocess.run(
            [sys.executable, "-m", "senet", "predict", "pretrained", str(image), *model, "--json"],
            env={**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert '"class": "' in done.stdout
    assert (tmp_path / "hf" / "hub" / "models--timm--legacy_seresnet18.in1k").is_dir()
