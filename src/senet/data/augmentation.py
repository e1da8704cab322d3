"""What training changes at random in its images: numbers alone, so that flags and tables of them
need no PyTorch. `senet.data.transforms` does it.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from senet.support.fields import misfit

Crop = Literal["none", "padded", "random_resized"]
Policy = Literal["none", "randaugment", "trivialaugment", "autoaugment", "augmix"]

_DEFAULT_SCALE = (0.08, 1.0)
_DEFAULT_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """What training changes at random in each image; by default nothing.

    In this order: crop, horizontal flip, rotation, the policy, pixel jitter, (normalization),
    random erasing; then mixup or cutmix over the batch. All but the padded crop and the pixel
    jitter are torchvision.transforms.v2's.

    Attributes:
        crop: "padded" pads by `padding` black pixels and crops back to the input's size (CIFAR);
            "random_resized" crops a random area and aspect ratio and resizes it (ImageNet);
            "none" is the evaluation's centre crop.
        padding: pixels on each side, for "padded".
        scale: least and greatest area of "random_resized", as a fraction of the image.
        ratio: least and greatest width/height of "random_resized".
        flip: mirror horizontally with probability 1/2.
        rotation: greatest angle in degrees, either way.
        jitter: greatest shift of each colour channel in levels of 0-255, either way (the released
            models' "pixel jitter ±20").
        randaugment: (operations, magnitude 0-30) of RandAugment (arXiv 1909.13719), or None.
        policy: a policy by its name: "randaugment" (2 operations, magnitude 9, unless
            `randaugment` says it), "trivialaugment" (arXiv 2103.10158), "autoaugment" (that of
            ImageNet, arXiv 1805.09501) or "augmix" (arXiv 1912.02781).
        mixup: alpha of mixup (arXiv 1710.09412); 0 is off.
        cutmix: alpha of CutMix (arXiv 1905.04899); 0 is off. With mixup too, each batch takes
            either with probability 1/2.
        random_erasing: probability of Random Erasing (arXiv 1708.04896).

    Raises:
        ValueError: a value outside its range, or one that the chosen crop does not use.
    """

    crop: Crop = "none"
    padding: int = 0
    scale: tuple[float, float] = field(default=_DEFAULT_SCALE, metadata={"flag": "crop_scale"})
    ratio: tuple[float, float] = field(default=_DEFAULT_RATIO, metadata={"flag": "crop_ratio"})
    flip: bool = False
    rotation: float = 0.0
    jitter: float = 0.0
    randaugment: tuple[int, int] | None = None
    policy: Policy = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if (wanted := misfit(value, each.type)) is not None:
                raise ValueError(f"{each.name} must be {wanted}, not {value!r}")
            if isinstance(value, list):  # from TOML and JSON
                object.__setattr__(self, each.name, tuple(value))
        if (self.crop == "padded") != (self.padding > 0) or self.padding < 0:
            raise ValueError(
                f"padding must be at least 1 with crop='padded' and 0 otherwise, not "
                f"{self.padding!r} with crop={self.crop!r}"
            )
        if self.crop != "random_resized" and (
            self.scale != _DEFAULT_SCALE or self.ratio != _DEFAULT_RATIO
        ):
            raise ValueError(f"scale and ratio belong to crop='random_resized', not {self.crop!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < least <= greatest <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < least <= greatest, not {self.ratio}")
        if self.randaugment is not None and not (
            self.randaugment[0] >= 1 and 0 <= self.randaugment[1] <= 30
        ):
            raise ValueError(
                f"randaugment must be (operations >= 1, magnitude 0-30), not {self.randaugment}"
            )
        if self.randaugment is not None and self.policy not in ("none", "randaugment"):
            raise ValueError(
                f"randaugment {self.randaugment} belongs to the policy randaugment, not to "
                f"{self.policy!r}: leave out one of them"
            )
        greatest = {
            "rotation": 180.0,
            "jitter": 255.0,
            "mixup": math.inf,
            "cutmix": math.inf,
            "random_erasing": 1.0,
        }
        for name, limit in greatest.items():
            value = getattr(self, name)
            if not 0 <= value <= limit or math.isinf(value):
                raise ValueError(f"{name} must be between 0 and {limit}, not {value!r}")

    @property
    def only_shifts(self) -> bool:
        """Whether all it does to an image is `PaddedCropFlip`: then a batch is done as a whole."""
        return (
            self.crop != "random_resized"
            and self.randaugment is None
            and self.policy == "none"
            and not (self.rotation or self.jitter or self.random_erasing)
        )
