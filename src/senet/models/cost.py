"""Parameters and multiply-adds of a network, counted by PyTorch on the meta device."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from senet.models import Network, build_model
from senet.nn.hooks import without_remark
from senet.support.copies import copied
from senet.support.fields import misfit


def meta_model(name: str, *, num_classes: int | None = None, **options: Any) -> Network:
    """A network without storage: its shapes can be counted, but it cannot be run on images.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the head; by default the 1000 of ImageNet, 10 for CIFAR networks.
        **options: as for `create_model`.

    Raises:
        UserError: as for `create_model`.
    """
    if num_classes is None:
        num_classes = 10 if name.endswith("_cifar") else 1000
    with torch.device("meta"):
        return build_model(name, num_classes=num_classes, **options)


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters (shared ones once; buffers such as BN statistics do not count)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_multiply_adds(model: nn.Module, input_size: tuple[int, ...] | None = None) -> int:
    """Multiply-adds of one image in a forward pass: convolutions and matrix products only.

    The paper's "FLOPs" are multiply-adds; PyTorch counts an addition and a multiplication as two.
    Elementwise work (BN, ReLU, the scaling by the gates) and pooling are not counted, as in the
    paper.

    Args:
        model: any module that takes one image batch; left untouched (a copy is counted).
        input_size: (C,H,W) of the image; the model's own `input_size` by default.

    Raises:
        ValueError: no input_size, and the model has none; or it is no tuple of sizes.
        UserError: the model cannot be copied.
    """
    if input_size is None:
        input_size = getattr(model, "input_size", None)
        if input_size is None:
            raise ValueError(f"input_size (C,H,W) is needed: {type(model).__name__} has none")
    if misfit(input_size, tuple[int, ...]) or min(input_size, default=0) < 1:
        raise ValueError(
            f"input_size must be (C,H,W), such as (3, 224, 224), got {input_size!r}: the sizes of "
            "one image, without the batch"
        )
    shadow = copied(model).to("meta").eval()
    dtype = next((p.dtype for p in shadow.parameters()), torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), without_remark(), counter:
        shadow(torch.empty(1, *input_size, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2
