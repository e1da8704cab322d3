"""A sampler that draws each class as often as another."""

from collections.abc import Callable

import pytest
import torch

from senet.data import Augmentation, ImageData, MemoryImages, Preprocessing, train_loader
from senet.errors import UserError
from senet.training.config import RunConfig
from senet.training.session import Session

Make = Callable[..., RunConfig]
TARGETS = torch.tensor([0] * 90 + [2] * 10)


def data() -> ImageData:
    pixels = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 8, 8)
    images = MemoryImages(pixels.contiguous(), TARGETS)
    return ImageData("rare", images, images, ("a", "b", "c"), Preprocessing(8, None, (0,), (1,), 1))


def epochs(count: int, augmentation: Augmentation = Augmentation()) -> list[torch.Tensor]:  # noqa: B008 - frozen
    loader = train_loader(data(), augmentation, batch_size=20, seed=3, num_workers=0, balanced=True)
    found = []
    for epoch in range(count):
        loader.set_epoch(epoch)
        found.append(torch.cat([labels for _, labels in loader]))
    return found


def test_classes_come_alike() -> None:
    labels = torch.cat(epochs(20))
    assert len(labels) == 2000
    share = float((labels == 2).double().mean())
    assert 0.45 < share < 0.55  # 4.5 standard deviations; 0.1 of the images
    assert not (labels == 1).any()  # a class without images
    assert not torch.equal(*epochs(2))
    assert torch.equal(epochs(1)[0], epochs(1)[0])


def test_an_image_that_comes_again_looks_different() -> None:
    loader = train_loader(
        data(), Augmentation(random_erasing=1.0), batch_size=5, seed=3, num_workers=0,
        balanced=True,
    )  # fmt: skip
    seen: dict[float, list[torch.Tensor]] = {}
    for images, _ in loader:
        for image in images:
            seen.setdefault(float(image.max()), []).append(image)
    again = [images for images in seen.values() if len(images) > 2]
    assert again
    assert all(not torch.equal(images[0], images[-1]) for images in again)


def test_in_a_run(tiny_config: Make) -> None:
    session = Session(tiny_config(recipe_sampler="balanced", recipe_augmentation=Augmentation()))
    drawn = torch.cat([labels for _, labels in session.batches(0)])
    assert len(drawn) == 48
    plain = Session(tiny_config())
    assert not torch.equal(drawn.float(), torch.cat([y.argmax(1) for _, y in plain.batches(0)]))


def test_what_does_not_tell_its_classes_is_refused() -> None:
    class Silent:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> None:
            raise AssertionError

    quiet = ImageData("quiet", Silent(), Silent(), ("a", "b"), data().preprocessing)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="quiet does not tell"):
        train_loader(quiet, Augmentation(), batch_size=4, seed=0, num_workers=0, balanced=True)
