"""How released networks want their images, as their publishers say it."""

import pytest
import timm
import torchvision

from senet.models.cost import meta_model
from senet.weights.layouts import LAYOUTS


@pytest.mark.parametrize("name", ["resnet50", "vgg16_bn", "inception_v3"])
def test_as_torchvision_says(name: str) -> None:
    wanted = torchvision.models.get_model_weights(name).IMAGENET1K_V1.transforms()
    found = LAYOUTS["torchvision"].preprocessing(meta_model(name))
    assert [found["resize"]] == wanted.resize_size
    assert [found["image_size"]] == wanted.crop_size
    assert found["interpolation"] == wanted.interpolation.value
    if name != "inception_v3":  # torchvision's scales its input to 0.5 ± 0.5 within the network
        assert (found["mean"], found["std"]) == (wanted.mean, wanted.std)


@pytest.mark.parametrize(
    ("name", "layout", "peer"),
    [
        ("inception_v3", "timm", "inception_v3.tf_in1k"),
        ("inception_resnet_v2", "timm", "inception_resnet_v2.tf_in1k"),
        ("se_resnet50", "timm", "seresnet50.ra2_in1k"),
        ("se_resnet50", "legacy", "legacy_seresnet50.in1k"),
        ("senet154", "legacy", "legacy_senet154.in1k"),
    ],
)
def test_as_timm_says(name: str, layout: str, peer: str) -> None:
    wanted = timm.get_pretrained_cfg(peer)
    found = LAYOUTS[layout].preprocessing(meta_model(name))
    assert found["image_size"] == wanted.input_size[1]
    assert found["resize"] == round(wanted.input_size[1] / wanted.crop_pct)
    assert found["interpolation"] == wanted.interpolation
    assert (tuple(found["mean"]), tuple(found["std"])) == (wanted.mean, wanted.std)
    assert (found["channels"], found["channel_order"], found["value_range"]) == (3, "rgb", 1.0)
