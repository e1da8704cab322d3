"""Copies of models: what cannot be copied is named, with the remedy."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, remove_weight_norm, spectral_norm, weight_norm

from senet.errors import UserError
from senet.support.copies import copied


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)))


def test_a_copy_shares_nothing() -> None:
    model = net()
    other = copied(model)
    assert type(other) is type(model)
    assert other[0].weight is not model[0].weight
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("hold", "message"),
    [
        (weight_norm, r"1\.0 \(Conv2d\) holds weight .*remove_weight_norm\(module, 'weight'\)"),
        (
            lambda conv: prune.l1_unstructured(conv, "bias", 0.5),
            r"1\.0 \(Conv2d\) holds bias .*prune\.remove\(module, 'bias'\)",
        ),
        (spectral_norm, r"holds weight .*remove_spectral_norm\(module, 'weight'\)"),
        (
            lambda conv: setattr(conv, "last", conv.weight * 2),
            r"1\.0 \(Conv2d\) holds last .* detach it first \(module\.last",
        ),
        (
            lambda conv: conv.register_buffer("ema", conv.weight * 2),
            r"holds ema .* detach it first",
        ),
        (
            lambda conv: setattr(conv, "lock", threading.Lock()),
            r"1\.0 \(Conv2d\) holds lock, a lock \(.*\); take it out",
        ),
    ],
)
def test_what_cannot_be_copied_is_named(hold, message: str) -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's note that weight_norm is of old
        hold(model[1][0])
        model(torch.zeros(1, 3, 8, 8))  # spectral_norm's weight is a plain tensor before
    with pytest.raises(UserError, match=r"^Sequential cannot be copied") as caught:
        copied(model)
    assert caught.match(message)


def test_the_remedy_helps() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(model[0])
    with pytest.raises(UserError):
        copied(model)
    remove_weight_norm(model[0])
    copied(model)
