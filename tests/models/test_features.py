"""Backbones: feature maps, dilation, Faster R-CNN on a COCO-format set, DeepLabv3."""

import copy
import json
import pickle

import pytest
import torch
from PIL import Image, ImageDraw
from tests.helpers.marks import separate_passes
from torch import nn
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_tensor

import senet
from senet.detection import faster_rcnn
from senet.errors import UserError
from senet.models.features import dilate, features
from senet.segmentation import deeplabv3


def backbone(name="se_resnet18", **options):
    return senet.create_model(name, num_classes=0, **options).eval()


@pytest.mark.parametrize(
    ("name", "stages", "channels", "strides"),
    [
        ("se_resnet18", (2, 3, 4, 5), (64, 128, 256, 512), (4, 8, 16, 32)),
        ("se_resnet50", (3, 5), (512, 2048), (8, 32)),
        ("se_vgg16_bn", (1, 3), (64, 256), (2, 8)),
        ("se_bn_inception", (3, 4, 5), (320, 608, 1024), (8, 16, 32)),
        ("se_resnet164_cifar", (2, 3, 4), (64, 128, 256), (1, 2, 4)),
    ],
)
def test_maps_have_the_channels_and_strides_they_claim(name, stages, channels, strides):
    model = backbone(name)
    maps = features(model, stages)
    assert (maps.channels, maps.strides) == (channels, strides)
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        out = maps(x)
        assert list(out) == [f"stage{number}" for number in stages]
        for value, width, stride in zip(out.values(), channels, strides, strict=True):
            assert value.shape == (1, width, 64 // stride, 64 // stride)
        if stages[-1] == max(model.stages):
            torch.testing.assert_close(out[f"stage{stages[-1]}"], model.forward_features(x))
    assert maps.state_dict().keys() <= model.state_dict().keys()


def test_all_parameters_of_the_maps_are_used():
    for stages in ((2, 3), None):
        maps = features(senet.create_model("se_resnet164_cifar", num_classes=2), stages)
        sum(value.sum() for value in maps(torch.randn(2, 3, 8, 8)).values()).backward()
        assert all(parameter.grad is not None for parameter in maps.parameters())


def replaced(way, backbone, layer):
    match way:
        case "attribute":
            backbone.conv1 = layer
        case "add_module":
            backbone.add_module("conv1", layer)
        case "set_submodule":
            backbone.set_submodule("conv1", layer)
        case "dictionary":
            backbone._modules["conv1"] = layer


@pytest.mark.parametrize(
    "first", [lambda b: b, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))]
)
@pytest.mark.parametrize("way", ["attribute", "add_module", "set_submodule", "dictionary"])
def test_replaced_children_run(way, first):
    network = senet.create_model("resnet8_cifar", num_classes=10).eval()
    maps = first(senet.features(network))
    names = list(maps.state_dict())
    assert names == [name for name in network.state_dict() if not name.startswith("fc")]
    replaced(way, maps, nn.Conv2d(4, 16, 3, padding=1, bias=False))
    assert maps(torch.randn(1, 4, 32, 32))["stage2"].shape == (1, 16, 32, 32)
    assert list(maps.state_dict()) == names
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 10)  # keeps its own
    del maps.conv1
    with pytest.raises(AttributeError, match="conv1"):
        maps(torch.randn(1, 4, 32, 32))


@separate_passes
def test_converted_batch_norms_run():
    maps = senet.features(senet.create_model("se_resnet8_cifar")).eval()
    x = torch.randn(2, 3, 32, 32)
    before = maps(x)
    maps = nn.SyncBatchNorm.convert_sync_batchnorm(maps)
    seen = []
    for module in maps.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.register_forward_hook(lambda module, *_: seen.append(module))
    torch.testing.assert_close(maps(x), before)
    assert set(seen) == {m for m in maps.modules() if isinstance(m, nn.SyncBatchNorm)}
    assert seen


def test_a_replica_runs_its_own_layers():
    maps = senet.features(senet.create_model("resnet8_cifar"))
    replica = maps._replicate_for_data_parallel()
    replica._modules["conv1"] = nn.Conv2d(4, 16, 3, padding=1, bias=False)
    assert replica(torch.randn(1, 4, 32, 32))["stage2"].shape == (1, 16, 32, 32)
    assert maps(torch.randn(1, 3, 32, 32))["stage2"].shape == (1, 16, 32, 32)


def test_frozen_batch_norms_stay():
    maps = features(backbone("se_resnet8_cifar"), frozen_bn=True).train()
    before = {key: value.clone() for key, value in maps.state_dict().items()}
    maps(torch.randn(4, 3, 8, 8))["stage4"].sum().backward()
    norms = [key for key in before if ".bn" in key or key.startswith("bn")]
    assert norms
    assert all(torch.equal(before[key], maps.state_dict()[key]) for key in norms)
    assert maps.conv1.weight.grad is not None
    assert maps.bn1.weight.grad is None


@pytest.mark.parametrize("stages", [(), (3, 2), (6,), (2, 2)])
def test_stages_that_are_not_there(stages):
    with pytest.raises(UserError, match=r"out_stages must be ascending numbers out of \(2, 3, 4"):
        features(backbone(), stages)


@pytest.mark.parametrize(
    ("name", "options", "output_stride"),
    [
        ("se_resnet18", {}, 8),
        ("se_resnet18", {}, 16),
        ("se_resnet50", {}, 8),
        ("se_resnet50", {"variant": "caffe"}, 8),
        ("senet154", {}, 8),
    ],
)
def test_dilation_keeps_the_values_at_the_former_positions(name, options, output_stride):
    """À trous: every second (fourth) position of the larger map is the former map.

    SE is taken out by a gate that does not see its input: its mean would change with the map.
    """
    model = backbone(name, **options).double()
    for module in model.modules():
        if isinstance(module, senet.SqueezeExcitation):
            torch.nn.init.zeros_(module.fc2.weight)
    x = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        expected = model.forward_features(x)
        dilate(model, output_stride)
        dense = model.forward_features(x)
    step = 32 // output_stride
    assert dense.shape[2] > expected.shape[2]
    size = expected.shape[2]
    torch.testing.assert_close(dense[:, :, ::step, ::step][:, :, :size, :size], expected)
    assert model.stages[5].stride == output_stride


def test_dilation_of_cifar_networks_and_of_others():
    model = backbone("resnet8_cifar")
    dilate(model, 2)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[2] == 16
    with pytest.raises(UserError, match="only residual networks can be dilated, not mobilenet"):
        dilate(backbone("mobilenet"), 8)
    with pytest.raises(UserError, match=r"output_stride must be one of \[4, 8, 16, 32\], got 5"):
        dilate(backbone(), 5)


@pytest.fixture
def coco(tmp_path):
    """Six images with one or two coloured rectangles, in COCO's format."""
    images, annotations = [], []
    for index in range(6):
        picture = Image.new("RGB", (96, 80), (20, 20, 20))
        draw = ImageDraw.Draw(picture)
        for box in range(1 + index % 2):
            x, y, w, h = 8 + 5 * index + 30 * box, 10 + 3 * index, 24, 28
            draw.rectangle((x, y, x + w, y + h), fill=(200, 40, 40) if box else (40, 40, 200))
            annotation = {"id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0}
            annotation |= {"category_id": 1 + box, "bbox": [x, y, w, h], "area": w * h}
            annotations.append(annotation)
        name = f"{index}.png"
        picture.save(tmp_path / name)
        images.append({"id": index + 1, "file_name": name, "height": 80, "width": 96})
    categories = [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
    file = tmp_path / "annotations.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return tmp_path


def read_coco(folder):
    """Images (3,H,W) in 0-1 and targets (boxes as corners, labels) of a COCO-format folder."""
    content = json.loads((folder / "annotations.json").read_text())
    images, targets = [], []
    for image in content["images"]:
        pixels = to_tensor(Image.open(folder / image["file_name"]))
        assert pixels.shape == (3, image["height"], image["width"])
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32)
        corners = box_convert(boxes, "xywh", "xyxy")
        labels = torch.tensor([a["category_id"] for a in mine])
        images.append(pixels)
        targets.append({"boxes": corners, "labels": labels})
    return images, targets


def test_faster_rcnn_learns_and_infers(coco):
    few = {"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 32}  # boxes, for speed
    detector = faster_rcnn("se_resnet18", 3, min_size=64, max_size=96, **few).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.005, momentum=0.9)
    images, targets = read_coco(coco)
    assert [len(target["boxes"]) for target in targets] == [1, 2, 1, 2, 1, 2]
    losses = []
    for _ in range(5):
        parts = detector(images, targets)
        assert {"loss_classifier", "loss_box_reg", "loss_objectness"} <= parts.keys()
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gradients = [p.grad for p in detector.backbone.body.parameters()]
    assert all(gradient is not None for gradient in gradients)
    with torch.no_grad():
        (found, _) = detector.eval()(images[:2])
    assert found["boxes"].shape[1:] == (4,)
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"])


def test_detector_takes_over_preprocessing(tmp_path):
    model = backbone()
    model.preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3, "channel_order": "rgb"}
    assert faster_rcnn(model, 2).transform.image_mean == [0.5] * 3
    model.preprocessing = {"mean": [127.5] * 3, "std": [1.0] * 3, "value_range": 255.0}
    transform = faster_rcnn(model, 2).transform
    assert (transform.image_mean, transform.image_std) == ([0.5] * 3, [1 / 255] * 3)
    model.preprocessing = {"channel_order": "bgr"}
    with pytest.raises(UserError, match="want bgr images"):
        faster_rcnn(model, 2)
    with pytest.raises(UserError, match="for a network given by name"):
        faster_rcnn(model, 2, pretrained=tmp_path)


def test_pretrained_backbone_is_frozen_where_it_should_be(tmp_path):
    senet.weights.save_weights(senet.create_model("se_resnet18"), tmp_path / "w.pth")
    detector = faster_rcnn("se_resnet18", 2, pretrained=tmp_path / "w.pth")
    assert detector.backbone.body.frozen_bn
    assert not faster_rcnn("se_resnet18", 2).backbone.body.frozen_bn


@pytest.mark.parametrize("aux", [False, True])
def test_deeplabv3_trains_and_infers(aux):
    model = deeplabv3("se_resnet18", 4, aux=aux)
    x = torch.randn(2, 3, 65, 65)
    labels = torch.randint(0, 4, (2, 65, 65))
    out = model(x)
    assert set(out) == ({"out", "aux"} if aux else {"out"})
    loss = sum(torch.nn.functional.cross_entropy(logits, labels) for logits in out.values())
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    with torch.no_grad():
        maps = model.backbone(x)
        assert maps["out"].shape == (2, 512, 9, 9)  # stride 8
        assert model.eval()(x)["out"].shape == (2, 4, 65, 65)
