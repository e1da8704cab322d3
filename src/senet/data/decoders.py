"""Pixels of JPEG through torchvision's own libjpeg-turbo instead of Pillow (`--decode turbo`).

Pillow still reads the header, so that formats, size limits, orientation and errors are the same;
only the pixels come from `torchvision.io.decode_jpeg`. Everything else is left to Pillow. PNG too:
`decode_png` of torchvision 0.29.1 ends the process (segmentation fault) at some damaged files.
"""

import io
import warnings
from typing import Literal, get_args

import torch
from PIL import Image

from senet.errors import UserError

Decoder = Literal["pillow", "turbo"]
_MODES = ("L", "RGB")  # CMYK means other things to torchvision
_left: list[str] = []  # the first image that was left to Pillow, for the remark about it
_told: list[str] = []


def check_decoder(decoder: str) -> Decoder:
    """The decoder of that name, if it works here.

    Args:
        decoder: "pillow", or "turbo" for torchvision's decoder of JPEG.

    Raises:
        UserError: another name, or this torchvision decodes no JPEG (built without libjpeg, or a
            release that no longer has `torchvision.io.decode_jpeg`, which 0.29 deprecates).
    """
    if decoder == "pillow":
        return "pillow"
    if decoder != "turbo":
        raise UserError(f"decode must be one of {', '.join(get_args(Decoder))}, got {decoder!r}")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "jpeg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _torchvision(file.getvalue())
        except (ImportError, AttributeError, RuntimeError) as error:
            import torchvision

            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"decode 'turbo': torchvision {torchvision.__version__} cannot decode JPEG here "
                f"({why}): leave it out, or install a torchvision that can"
            ) from error
    return "turbo"


def _torchvision(data: bytes) -> torch.Tensor:
    """(H,W,C) uint8 as the file has it: C is 1, 3, or 4 (CMYK)."""
    from torchvision.io import decode_jpeg

    content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_jpeg(content).permute(1, 2, 0)


def turbo_pixels(image: Image.Image, data: bytes, name: str) -> Image.Image | None:
    """The image as torchvision decodes it, or None where it must be left to Pillow.

    What torchvision fails at is left to Pillow too, whose error then tells what is wrong. To be
    called where warnings are ignored: torchvision 0.29 warns at each call.

    Args:
        image: opened by Pillow, not loaded: its header was read, its size is within the limit.
        data: content of the file.
        name: what a remark calls it.
    """
    if image.mode in _MODES and image.format in ("JPEG", "MPO"):
        try:
            pixels = _torchvision(data)
        except RuntimeError:
            pixels = torch.empty(0)
        channels = len(image.getbands())
        if pixels.shape == (image.height, image.width, channels):
            decoded = Image.fromarray((pixels[..., 0] if channels == 1 else pixels).numpy())
            decoded.info = image.info.copy()  # the orientation is in it
            return decoded
    if not _left:
        _left.append(f"{name} ({image.format}, mode {image.mode})")
    return None


def tell_what_was_left() -> None:
    """Warn, once a process, that an image was left to Pillow."""
    if _left and not _told:
        _told.append(_left[0])
        warnings.warn(
            "decode 'turbo' takes JPEG, grey or RGB; Pillow decodes the others, "
            f"such as {_left[0]}",
            stacklevel=3,
        )
