"""Preprocessing and augmentation: the numbers, the ranges, the refusals."""

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import picture
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from senet.data import Augmentation, Preprocessing
from senet.data.transforms import (
    PaddedCropFlip,
    PixelJitter,
    batch_transform,
    training_transform,
)

IMAGENET = Preprocessing(
    image_size=224, resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
# Without a change of scale: one level of 255 stays 1/255.
PLAIN = Preprocessing(image_size=8, resize=8, mean=(0.0,), std=(1.0,), channels=1)


def levels(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor * 255).round().to(torch.uint8)


def test_evaluation_transform_resizes_crops_and_normalizes() -> None:
    image = Image.new("RGB", (1000, 512), (255, 128, 0))
    out = IMAGENET.transform()(image)
    assert (out.shape, out.dtype) == ((3, 224, 224), torch.float32)
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    for channel, value in enumerate(expected):
        assert torch.allclose(out[channel], torch.tensor(value), atol=1e-6)


def test_the_centre_is_kept() -> None:
    image = Image.new("L", (24, 8), 0)
    image.paste(255, (8, 0, 16, 8))
    assert levels(PLAIN.transform()(image)).min() == 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "I;16"])
def test_any_mode_is_taken(mode: str) -> None:
    image = Image.new(mode, (9, 9)) if mode == "I;16" else picture(0, (9, 9)).convert(mode)
    assert PLAIN.transform()(image).shape == (1, 8, 8)
    assert IMAGENET.transform()(image).shape == (3, 224, 224)


def test_without_resize_a_small_image_is_padded() -> None:
    preprocessing = Preprocessing(image_size=4, resize=None, mean=(0,), std=(1,), channels=1)
    out = levels(preprocessing.transform()(Image.new("L", (2, 2), 255)))
    assert out[0].tolist() == [[0] * 4, [0, 255, 255, 0], [0, 255, 255, 0], [0] * 4]


# As the layout of BN-Inception from Caffe implies it.
CAFFE = Preprocessing(
    image_size=224,
    resize=256,
    mean=(104.0, 117.0, 128.0),
    std=(1.0, 1.0, 1.0),
    channel_order="bgr",
    value_range=255.0,
)


def test_caffe_takes_blue_first_and_whole_levels() -> None:
    out = CAFFE.transform()(Image.new("RGB", (300, 256), (255, 128, 3)))
    assert (out.shape, out.dtype) == ((3, 224, 224), torch.float32)
    for channel, value in enumerate((3 - 104, 128 - 117, 255 - 128)):
        assert (out[channel] == value).all()


def test_value_range_is_a_matter_of_units() -> None:
    images = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    scaled = {
        "mean": tuple(255 * value for value in IMAGENET.mean),
        "std": tuple(255 * value for value in IMAGENET.std),
        "value_range": 255,
    }
    other = dataclasses.replace(IMAGENET, **scaled)
    torch.testing.assert_close(other.finish(images), IMAGENET.finish(images), rtol=0, atol=1e-6)


def test_training_images_get_the_same_order() -> None:
    augmented = training_transform(Augmentation(crop="random_resized", flip=True), CAFFE)
    out = augmented(Image.new("RGB", (300, 256), (255, 128, 3)))
    assert out[:, 0, 0].tolist() == [3 - 104, 128 - 117, 255 - 128]


@pytest.mark.parametrize("preprocessing", [PLAIN, IMAGENET, CAFFE])
def test_finish_batch_equals_finish_bit_for_bit(preprocessing: Preprocessing) -> None:
    shape = (16, preprocessing.channels, 16, 16)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    images[0, :].view(preprocessing.channels, -1)[:] = torch.arange(256)
    assert torch.equal(preprocessing.finish_batch(images.numpy()), preprocessing.finish(images))


@pytest.mark.parametrize(
    ("interpolation", "filter_"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
@pytest.mark.parametrize("side", [5, 21])  # larger and smaller than the input
def test_interpolation_is_the_one_that_is_named(
    interpolation: Any, filter_: Image.Resampling, side: int
) -> None:
    """Wherever an image is resized: as Pillow does it, with antialiasing."""
    preprocessing = dataclasses.replace(PLAIN, interpolation=interpolation)
    image = picture(0, (side, side), "L")
    expected = np.asarray(image.resize((8, 8), filter_))
    whole = Augmentation(crop="random_resized", scale=(1, 1), ratio=(1, 1))
    for transform in (
        preprocessing.transform(),
        training_transform(Augmentation(), preprocessing),
        training_transform(whole, preprocessing),
    ):
        assert np.array_equal(levels(transform(image))[0].numpy(), expected)
    assert np.array_equal(preprocessing.pixels()(image)[0].numpy(), expected)


def test_randaugment_interpolates_as_the_resize_does() -> None:
    image = picture(0, (8, 8), "L")  # nothing is to resize
    seen = []
    for interpolation in ("bilinear", "bicubic"):
        preprocessing = dataclasses.replace(PLAIN, interpolation=interpolation)
        transform = training_transform(Augmentation(randaugment=(1, 20)), preprocessing)
        torch.manual_seed(0)
        seen.append([transform(image) for _ in range(12)])
    assert any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("resize", [None, 256])
def test_preprocessing_survives_json(resize: int | None) -> None:
    before = Preprocessing(224, resize, (0.4,), (0.2,), channels=1, interpolation="bicubic")
    values = json.loads(json.dumps(before.to_dict()))
    assert None not in values.values()
    assert Preprocessing.from_dict(values) == before
    for preprocessing in (CAFFE, IMAGENET):
        assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


def test_checkpoints_from_before_are_rgb_and_0_to_1() -> None:
    former = IMAGENET.to_dict()
    assert (former.pop("channel_order"), former.pop("value_range")) == ("rgb", 1.0)
    assert Preprocessing.from_dict(former) == IMAGENET


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1 pixel, not 0"),
        ({"resize": 200}, "at least image_size 224, not 200"),
        ({"mean": (0.5,)}, "need 3 values"),
        ({"std": (0.2, 0.0, 0.2)}, "std positive"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean must be finite"),
        ({"channels": 0}, "channels must be a whole number from 1, not 0"),
        ({"channels": 4}, "mean and std need 4 values"),
        ({"depth": "32"}, "depth must be one of .*'float'.*, not '32'"),
        ({"channel_order": "rbg"}, "channel_order must be rgb or bgr, not 'rbg'"),
        ({"value_range": 256}, "value_range must be 1 or 255, not 256.0"),
        (
            {"channels": 1, "mean": (0.5,), "std": (0.5,), "channel_order": "bgr"},
            "channel_order bgr needs 3 channels",
        ),
        ({"interpolation": "nearest"}, "bilinear or bicubic, not 'nearest'"),
        ({"sharpen": 1}, "unknown preprocessing fields.*sharpen"),
    ],
)
def test_invalid_preprocessing(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict({**IMAGENET.to_dict(), **change})


def test_missing_preprocessing_field() -> None:
    values = IMAGENET.to_dict()
    del values["mean"]
    with pytest.raises(ValueError, match=r"lacks.*mean"):
        Preprocessing.from_dict(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "centre"}, "crop must be one of"),
        ({"crop": "padded"}, "padding must be at least 1"),
        ({"padding": 4}, "padding must be .* 0 otherwise, not 4 with crop='none'"),
        ({"crop": "padded", "padding": -1}, "not -1"),
        ({"padding": -1}, "not -1 with crop='none'"),
        ({"scale": (0.5, 1)}, "belong to crop='random_resized', not 'none'"),
        ({"crop": "random_resized", "scale": (0, 1)}, "scale must be"),
        ({"crop": "random_resized", "scale": (1,)}, "two numbers"),
        ({"crop": "random_resized", "ratio": (2, 1)}, "ratio must be"),
        ({"randaugment": (0, 9)}, "randaugment must be"),
        ({"randaugment": (2, 31)}, "randaugment must be"),
        ({"rotation": -1}, "rotation must be between 0 and 180.0, not -1"),
        ({"jitter": 256}, "jitter must be"),
        ({"mixup": math.inf}, "mixup must be"),
        ({"cutmix": math.nan}, "cutmix must be"),
        ({"random_erasing": 1.5}, "random_erasing must be between 0 and 1.0, not 1.5"),
    ],
)
def test_invalid_augmentation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_lists_from_toml_become_tuples() -> None:
    augmentation = Augmentation(crop="random_resized", scale=[0.1, 1], randaugment=[2, 9])  # type: ignore[arg-type]
    assert augmentation.scale == (0.1, 1)
    assert augmentation.randaugment == (2, 9)
    hash(augmentation)


def test_no_augmentation_is_the_evaluation_transform() -> None:
    image = picture(0, (30, 20), "L")
    out = training_transform(Augmentation(), PLAIN)(image)
    assert torch.equal(out, PLAIN.transform()(image))


def test_padded_crop_shifts_and_flips_by_all_amounts() -> None:
    image = picture(0, (8, 8), "L")
    array = np.asarray(image)
    padded = np.pad(array, 2)
    windows = {}
    for top in range(5):
        for left in range(5):
            window = padded[top : top + 8, left : left + 8]
            windows[window.tobytes()] = (top, left, False)
            windows[window[:, ::-1].tobytes()] = (top, left, True)
    transform = training_transform(Augmentation(crop="padded", padding=2, flip=True), PLAIN)
    seen = [windows[levels(transform(image)).numpy().tobytes()] for _ in range(1500)]
    assert len(set(seen)) == len(windows) == 50
    # Uniform: each of 50 outcomes 30 times of 1500 on average, standard deviation 5.4.
    counts = [seen.count(outcome) for outcome in set(seen)]
    assert min(counts) > 30 - 5 * 5.4
    assert max(counts) < 30 + 5 * 5.4


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (3, False), (4, True)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_batch_is_shifted_like_each_image(padding: int, flip: bool, mode: str) -> None:
    shifts = PaddedCropFlip(padding, flip)
    images = [picture(i, (6, 5), mode) for i in range(20)]
    generator = torch.Generator()
    draws = [shifts.draw(generator.manual_seed(i)) for i in range(20)]
    arrays = np.stack([np.asarray(image).reshape(5, 6, -1) for image in images])
    batch = shifts.batch(arrays.transpose(0, 3, 1, 2), draws)
    for i, image in enumerate(images):
        torch.manual_seed(i)
        one = np.asarray(shifts(image)).reshape(5, 6, -1)
        assert np.array_equal(batch[i], one.transpose(2, 0, 1))


def test_pixel_jitter_stays_within_its_range() -> None:
    jitter = PixelJitter(20)
    image = torch.full((3, 2, 2), 128, dtype=torch.uint8)
    shifts = torch.stack([jitter(image)[:, 0, 0].int() - 128 for _ in range(500)])
    assert shifts.abs().max() <= 20
    assert shifts.min() < -15
    assert shifts.max() > 15
    assert not torch.equal(shifts[:, 0], shifts[:, 1])  # each channel its own
    assert (jitter(image) == jitter(image)[:, :1, :1]).sum() <= 12
    assert jitter(torch.zeros(1, 2, 2, dtype=torch.uint8)).max() <= 20
    assert jitter(torch.full((1, 2, 2), 255, dtype=torch.uint8)).min() >= 235


@pytest.mark.parametrize(
    "options",
    [
        {"crop": "random_resized"},
        {"flip": True},
        {"rotation": 10.0},
        {"jitter": 20.0},
        {"randaugment": (2, 9)},
        {"random_erasing": 1.0},
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_each_augmentation_acts_and_keeps_the_shape(options: dict[str, Any], mode: str) -> None:
    channels = {"L": 1, "RGB": 3}[mode]
    preprocessing = Preprocessing(16, 18, (0.5,) * channels, (0.25,) * channels, channels)
    augmentation = Augmentation(**options)
    assert augmentation.only_shifts == (options == {"flip": True})
    transform = pickle.loads(pickle.dumps(training_transform(augmentation, preprocessing)))
    image = picture(0, (20, 24), mode)
    reference = preprocessing.transform()(image)
    outs = [transform(image) for _ in range(12)]
    assert {(out.shape, out.dtype) for out in outs} == {((channels, 16, 16), torch.float32)}
    assert any(not torch.equal(out, reference) for out in outs)
    assert any(not torch.equal(out, outs[0]) for out in outs)


def test_random_resized_crop_takes_the_scale() -> None:
    # The whole image at its own aspect ratio is the only crop allowed.
    augmentation = Augmentation(crop="random_resized", scale=(1, 1), ratio=(1, 1))
    image = picture(0, (8, 8), "L")
    out = training_transform(augmentation, PLAIN)(image)
    assert torch.equal(out, PLAIN.transform()(image))


@pytest.mark.parametrize(("options", "patches"), [({"mixup": 0.2}, False), ({"cutmix": 1.0}, True)])
def test_mixup_and_cutmix_mix_labels_as_images(options: dict[str, float], patches: bool) -> None:
    mix = batch_transform(Augmentation(**options), 3)
    assert mix is not None
    # Image i is filled with one-hot values of its class, so that its mean tells the mixture.
    labels = torch.tensor([0, 1, 2, 0])
    images = torch.nn.functional.one_hot(labels, 3).float()[:, :, None, None].repeat(1, 1, 32, 32)
    mixed, soft = mix(images.clone(), labels)
    assert soft.shape == (4, 3)
    assert torch.allclose(soft.sum(1), torch.ones(4))
    assert torch.allclose(mixed.mean((2, 3)), soft, atol=1e-5)
    assert bool(((mixed == 0) | (mixed == 1)).all()) == patches


def test_both_mixes_take_turns_and_neither_is_none() -> None:
    assert batch_transform(Augmentation(), 3) is None
    both = batch_transform(Augmentation(mixup=0.2, cutmix=1.0), 2)
    assert both is not None
    images = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    whole = {
        bool(((mixed == 0) | (mixed == 1)).all())
        for mixed, _ in (both(images.clone(), torch.tensor([0, 1])) for _ in range(40))
    }
    assert whole == {True, False}


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (4_001, 3), (3, 4_000)])
def test_a_long_strip_takes_no_memory_and_its_middle_is_the_input(size: tuple[int, int]) -> None:
    strip = picture(0, size)
    preprocessing = Preprocessing(16, 20, (0.5,) * 3, (0.5,) * 3)
    made: list[int] = []
    resize = Image.Image.resize

    def counted(self: Image.Image, wanted: tuple[int, int], *rest: Any, **more: Any) -> Image.Image:
        made.append(wanted[0] * wanted[1])
        return resize(self, wanted, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", counted)
        for transform in (
            preprocessing.transform(),
            preprocessing.pixels(),
            training_transform(Augmentation(crop="padded", padding=2), preprocessing),
            training_transform(Augmentation(crop="random_resized"), preprocessing),
        ):
            assert transform(strip).shape == (3, 16, 16)
    assert max(made) <= 20 * 20 * 17
    if min(size) > 1:  # the same as of the whole strip, but for the rounding of its length
        whole = v2.CenterCrop(16)(v2.Resize(20, antialias=True)(strip))
        ours = preprocessing.pixels()(strip).int() - F.pil_to_tensor(whole).int()
        assert ours.abs().float().mean() < 12


def test_ordinary_images_are_not_cut() -> None:
    preprocessing = Preprocessing(16, 20, (0.5,) * 3, (0.5,) * 3)
    for size in ((160, 10), (10, 160), (30, 20)):
        image = picture(1, size)
        whole = F.pil_to_tensor(v2.CenterCrop(16)(v2.Resize(20, antialias=True)(image)))
        assert torch.equal(preprocessing.pixels()(image), whole)
