"""Layouts, wrappers, adaptation and errors; parity itself is in tests/models/test_parity.py."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import senet
from senet.errors import UserError
from senet.weights import convert, load_weights, read_state_dict, save_weights, timm_name
from senet.weights.load import adapt_channels


@pytest.fixture
def timm18():
    return timm.create_model("seresnet18", num_classes=5).eval()


def make(name="se_resnet18", **options):
    return senet.create_model(name, **{"num_classes": 5, **options}).eval()


def same_logits(model, peer, channels=3):
    x = torch.randn(2, channels, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(model(x), peer(x), rtol=1e-4, atol=1e-5)


WRAPPINGS = {
    "module.": lambda state: {f"module.{k}": v for k, v in state.items()},
    "model.": lambda state: {f"model.{k}": v for k, v in state.items()},
    "compiled": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "checkpoint": lambda state: {"epoch": 3, "state_dict": state},
    "lightning": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    "model key": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_state_dicts(timm18, wrapping, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](timm18.state_dict()), path)
    model = make()
    load_weights(model, path)
    same_logits(model, timm18)


def test_safetensors_and_report(timm18, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm18.state_dict(), path)
    model = make()
    report = load_weights(model, path)
    same_logits(model, timm18)
    assert report.layout == "timm"
    assert report.changed == {"divisor": 8}
    assert str(report) == f"{len(timm18.state_dict())} tensors in the layout of timm; set divisor=8"
    assert model.preprocessing == {
        "image_size": 224,
        "resize": 256,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "channels": 3,
        "interpolation": "bicubic",
        "channel_order": "rgb",
        "value_range": 1.0,
    }


def test_hub_sources_are_fetched_through_huggingface_hub(timm18, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(timm18.state_dict(), path)
    asked = []

    def download(*arguments):
        asked.append(arguments)
        return str(path)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, token: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = senet.create_model("se_resnet18", num_classes=5, pretrained="hf_hub:owner/name").eval()
    same_logits(model, timm18)
    assert asked == [("owner/name", "model.safetensors")]


def test_moskomule_has_linear_gates_without_biases():
    model = make("se_resnet50", bias=False)
    moskomule = convert(model, "moskomule")
    assert moskomule["layer1.0.se.fc.0.weight"].shape == (16, 256)
    assert not any(".se." in key and key.endswith("bias") for key in moskomule)
    other = make("se_resnet50")
    report = load_weights(other, moskomule)
    assert (report.layout, report.changed) == ("moskomule", {"bias": False})
    same_logits(other, model)
    assert senet.list_models("se_resnet50") == [other.config["name"]]
    assert other.config["options"] == {"bias": False}
    # And the way back to a network with biases.
    assert load_weights(other, make("se_resnet50").state_dict()).changed == {"bias": True}
    assert other.layer1[0].se.fc1.bias is not None


def test_moskomule_refuses_biases():
    with pytest.raises(UserError, match="have no biases, and these are not zero"):
        convert(make("se_resnet50"), "moskomule")


def test_adapted_network_can_be_rebuilt_from_its_configuration(timm18, tmp_path):
    model = make()
    load_weights(model, timm18.state_dict())
    save_weights(model, tmp_path / "own.safetensors")
    options = model.config["options"]
    again = senet.create_model("se_resnet18", num_classes=5, **options).eval()
    report = load_weights(again, tmp_path / "own.safetensors")
    assert (report.layout, report.changed) == ("senet", {})
    assert again.preprocessing == model.preprocessing
    same_logits(again, timm18)


def test_variant_comes_with_the_file(tmp_path):
    caffe = make("resnet50", variant="caffe")
    save_weights(caffe, tmp_path / "own.safetensors")
    model = make("resnet50")
    assert load_weights(model, tmp_path / "own.safetensors").changed == {"variant": "caffe"}
    same_logits(model, caffe)
    save_weights(make(gate="tanh"), tmp_path / "tanh.safetensors")
    with pytest.raises(UserError, match="weights are of a network with gate='tanh'"):
        load_weights(make(), tmp_path / "tanh.safetensors")


def test_trained_hidden_width_is_padded_for_timm():
    """timm rounds 4 up to 8: zeros fill the gap, and the logits stay."""
    model = make()
    peer = timm.create_model(timm_name(model), num_classes=5).eval()
    peer.load_state_dict(convert(model, "timm"), strict=True)
    same_logits(model, peer)
    without_bias = make(bias=False)
    peer.load_state_dict(convert(without_bias, "timm"), strict=True)
    same_logits(without_bias, peer)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_for_timm_legacy(suffix, tmp_path):
    model = make("se_resnet50", variant="caffe")
    save_weights(model, tmp_path / f"weights{suffix}", layout="timm")
    peer = timm.create_model("legacy_seresnet50", num_classes=5).eval()
    peer.load_state_dict(read_state_dict(tmp_path / f"weights{suffix}"), strict=True)
    same_logits(model, peer)


@pytest.mark.parametrize("channels", [1, 4])
def test_first_convolution_is_adapted_as_timm_does(channels):
    peer = timm.create_model("resnet18", num_classes=5)
    model = make("resnet18", in_channels=channels)
    report = load_weights(model, peer.state_dict())
    assert report.adapted == "conv1.weight"
    expected = timm.models.adapt_input_conv(channels, peer.conv1.weight)
    torch.testing.assert_close(model.conv1.weight, expected)
    assert (model.preprocessing is None) == (channels == 4)
    if channels == 1:
        assert model.preprocessing["mean"] == [pytest.approx((0.485 + 0.456 + 0.406) / 3)]


def test_grey_images_give_what_three_equal_channels_gave():
    weight, grey = torch.randn(4, 3, 3, 3), torch.randn(1, 1, 9, 9)
    three = nn.functional.conv2d(grey.expand(1, 3, 9, 9), weight)
    one = nn.functional.conv2d(grey, adapt_channels(weight, 1))
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)


def test_new_head_for_fine_tuning(timm18, tmp_path):
    torch.save(timm18.state_dict(), tmp_path / "five.pth")
    model = senet.create_model("se_resnet18", num_classes=9, pretrained=tmp_path / "five.pth")
    assert torch.equal(model.conv1.weight, timm18.conv1.weight)
    assert model.fc.weight.shape == (9, 512)
    report = load_weights(model, tmp_path / "five.pth", new_head=True)
    assert report.kept == ("fc.weight", "fc.bias")
    with pytest.raises(UserError, match="fc has 5 classes and the model's 1000: make the model"):
        senet.create_model("se_resnet18", pretrained=tmp_path / "five.pth")


def test_without_classes_the_classifier_is_dropped(timm18):
    model = make(num_classes=0)
    report = load_weights(model, timm18.state_dict())
    assert report.dropped == ("fc.weight", "fc.bias")
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        features = timm18.forward_head(timm18.forward_features(x), pre_logits=True)
        torch.testing.assert_close(model(x), features, rtol=1e-4, atol=1e-5)


def test_old_files_without_counters_of_batch_norm(timm18):
    state = {k: v for k, v in timm18.state_dict().items() if "num_batches" not in k}
    model = make()
    load_weights(model, state)
    same_logits(model, timm18)


def bninception_state(model):
    """As pretrainedmodels has it: convolutions with biases, which are not zero."""
    state = convert(model, "bninception")
    for key in state:
        if key.endswith(".bias") and f"{key.removesuffix('.bias')}_bn.bias" in state:
            bias = torch.randn_like(state[key])
            state[key] = bias
            state[f"{key.removesuffix('.bias')}_bn.running_mean"] += bias
    return state


def test_bn_inception_from_caffe_wants_bgr_images_up_to_255():
    model = make("bn_inception")
    state = bninception_state(model)
    assert {"conv1_7x7_s2.bias", "inception_3a_double_3x3_reduce_bn.weight"} <= state.keys()
    assert {"inception_5b_pool_proj.weight", "last_linear.bias"} <= state.keys()
    other = make("bn_inception")
    report = load_weights(other, state)
    same_logits(other, model)
    assert report.layout == "bninception"
    wanted = {"channel_order": "bgr", "value_range": 255.0, "std": [1.0] * 3}
    assert wanted.items() <= other.preprocessing.items()
    assert other.preprocessing["mean"] == [104.0, 117.0, 128.0]
    with pytest.raises(UserError, match=r"has no SE blocks, so no place for inception_3a\.se"):
        convert(make("se_bn_inception"), "bninception")


def test_plain_pretrainedmodels_call_the_classifier_last_linear():
    model = make("inception_resnet_v2")
    state = convert(model, "pretrainedmodels")
    assert "last_linear.weight" in state
    assert "classif.weight" not in state
    other = make("inception_resnet_v2")
    report = load_weights(other, state)
    assert report.layout == "pretrainedmodels"
    assert other.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert torch.equal(other.classif.weight, model.classif.weight)


def test_a_wrong_layout_says_what_differs_and_changes_nothing(timm18):
    model = make("se_resnet50")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"the layout of timm\): layer1.0.downsample.0.weight"):
        load_weights(model, timm18.state_dict())
    narrow = make("se_resnet50", reduction=8)
    with pytest.raises(UserError, match=r"fc1.weight has shape \(32, 256\), not \(16, 256\)"):
        load_weights(model, narrow.state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.config["options"] == {}
    with pytest.raises(UserError, match=r"layer1.0.se.fc1.weight is missing"):
        load_weights(model, make("resnet50").state_dict())


@pytest.mark.parametrize(
    ("name", "options", "layout", "message"),
    [
        ("se_resnet20_cifar", {}, "timm", "timm has no network se_resnet20_cifar"),
        ("se_resnet50", {"gate": "tanh"}, "timm", "timm has no networks with gate=tanh"),
        ("se_resnet50", {}, "legacy", "the legacy layout is for SE networks of the variant caffe"),
        ("se_resnet50", {}, "torchvision", "torchvision has no SE networks, so no place for"),
        ("se_resnet50", {}, "keras", "layout must be one of bninception, legacy, .* got 'keras'"),
    ],
)
def test_layouts_that_cannot_hold_a_network(name, options, layout, message):
    with pytest.raises(UserError, match=message):
        convert(make(name, **options), layout)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / "missing.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        read_state_dict(tmp_path / "text.safetensors")
    torch.save({"lr": 0.1}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no state dict \(tensors by name\) in .*other.pth"):
        read_state_dict(tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"path must end in \.safetensors or \.pth"):
        save_weights(make("resnet8_cifar"), tmp_path / "weights.h5")


def test_any_module_loads_its_own_names(tmp_path):
    layer = nn.Linear(3, 2)
    report = load_weights(nn.Linear(3, 2), layer.state_dict())
    assert report.loaded == 2
    with pytest.raises(UserError, match=r"weight has shape \(2, 3\), not \(2, 4\)"):
        load_weights(nn.Linear(4, 2), layer.state_dict())


def test_preprocessing_fits_the_network(tmp_path):
    """Grey images have no order of channels, and no layout knows how CIFAR was prepared."""
    state = convert(make("bn_inception"), "bninception")
    grey = make("bn_inception", in_channels=1)
    load_weights(grey, state)
    assert (grey.preprocessing["channel_order"], grey.preprocessing["channels"]) == ("rgb", 1)
    assert grey.preprocessing["mean"] == [pytest.approx((104 + 117 + 128) / 3)]
    small = senet.create_model("resnet8_cifar", num_classes=5)
    assert load_weights(small, small.state_dict()).layout == "torchvision"
    assert small.preprocessing is None
