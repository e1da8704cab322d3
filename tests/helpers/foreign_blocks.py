"""SE blocks as other libraries write them, and what resembles SE without being it.

Written anew from descriptions, each in a few lines, for libraries that are not installed in tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MonaiChannelSE(nn.Module):
    """Linear layers, one to three dimensions; its residual form adds the map itself."""

    def __init__(self, channels: int, dims: int = 2, residual: bool = False) -> None:
        super().__init__()
        self.dims, self.residual = dims, residual
        self.avg_pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[
            dims - 1
        ](1)
        self.fc = nn.Sequential(
            nn.Linear(channels, 4), nn.ReLU(inplace=True), nn.Linear(4, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, *(1,) * self.dims)
        return x + x * y if self.residual else x * y


class SpeechBrainSE(nn.Module):
    """Convolutions over time, a mean over the frames that count, functional sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(channels, 4, 1), nn.Conv1d(4, channels, 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        frames = x.shape[-1]
        if lengths is None:
            s = x.mean(dim=2, keepdim=True)
        else:
            mask = torch.arange(frames, device=x.device)[None] < (lengths * frames)[:, None]
            mask = mask.unsqueeze(1)
            s = (x * mask).sum(dim=2, keepdim=True) / mask.sum(dim=2, keepdim=True)
        return torch.sigmoid(self.conv2(torch.relu(self.conv1(s)))) * x


class WeSpeakerSE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.linear1(x.mean(dim=2)))
        return x * torch.sigmoid(self.linear2(out)).unsqueeze(2)


class ScSE(nn.Module):
    """Channel half and spatial half, added (U-Nets)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, 4, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cSE(x) + x * self.sSE(x)


class InlinedMBConv(nn.Module):
    """An EfficientNet block whose SE has no module of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.se_reduce, self.se_expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.depthwise(inputs)))
        squeezed = F.adaptive_avg_pool2d(x, 1)
        squeezed = self.se_expand(F.silu(self.se_reduce(squeezed)))
        x = torch.sigmoid(squeezed) * x
        return self.bn2(self.project(x)) + inputs


class RepVGGSE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.input_channels = channels

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.avg_pool2d(inputs, kernel_size=inputs.size(3))
        x = torch.sigmoid(self.up(F.relu(self.down(x)))).view(-1, self.input_channels, 1, 1)
        return inputs * x


class Lc0SE(nn.Module):
    """Scale and shift: sigmoid(W)·x + B."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4), nn.Linear(4, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        scale, shift = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).chunk(2, 1)
        return torch.sigmoid(scale).view(n, c, 1, 1) * x + shift.view(n, c, 1, 1)


class HFRegNetSE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        self.attention = nn.Sequential(
            nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1), nn.Sigmoid()
        )

    def forward(self, hidden_state: Tensor) -> Tensor:
        return hidden_state * self.attention(self.pooler(hidden_state))


class HFEfficientNetSE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(output_size=1)
        self.reduce = nn.Conv2d(channels, 4, 1, padding="same")
        self.expand = nn.Conv2d(4, channels, 1, padding="same")
        self.act_reduce, self.act_expand = nn.SiLU(), nn.Sigmoid()

    def forward(self, hidden_states: Tensor) -> Tensor:
        inputs = hidden_states
        hidden_states = self.act_reduce(self.reduce(self.squeeze(hidden_states)))
        return torch.mul(inputs, self.act_expand(self.expand(hidden_states)))


class OldHardSE(nn.Module):
    """Hard sigmoid as it was written before it had a name; pooled in two steps, with a view."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        y = self.fc(x.mean(3).mean(2))
        return x * (F.relu6(y + 3.0) / 6.0).view(x.size(0), x.size(1), 1, 1).expand_as(x)


class ChannelsLastSE(nn.Module):
    """Works on (N,H,W,C) in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        gates = torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((1, 2), keepdim=True)))))
        return (y * gates).permute(0, 3, 1, 2)


class StdSE(nn.Module):
    """Mean and standard deviation (SRM), a weight for each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cfc, self.bn = (
            nn.Conv1d(channels, channels, 2, groups=channels),
            nn.BatchNorm1d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        style = torch.stack((flat.mean(-1), flat.std(-1)), -1)
        return x * torch.sigmoid(self.bn(self.cfc(style)))[..., None]


class InATuple(nn.Module):
    """A block that returns more than the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.se = HFRegNetSE(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.se(x)
        return y, {"mean": y.mean()}


class Body(nn.Module):
    """A convolution, the block, and a head, in which the block runs in the way that is asked for.

    Args:
        block: the SE block.
        way: "plain", "checkpoint", "reentrant", "list", "tuple" or "twice".
        channels: of the map.
        dims: spatial dimensions.
    """

    def __init__(
        self, block: nn.Module, way: str = "plain", channels: int = 16, dims: int = 2
    ) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.way = way
        self.stem, self.bn = conv(3, channels, 3, 2, 1), norm(channels)
        self.blocks = nn.ModuleList([block])
        self.last = conv(channels, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        for block in self.blocks:
            if self.way in ("checkpoint", "reentrant"):
                x = checkpoint(block, x, use_reentrant=self.way == "reentrant")
            elif self.way == "tuple":
                x, _ = block(x)
            elif self.way == "twice":
                x = block(block(x))
            else:
                x = block(x)
        x = F.relu(self.last(x))
        return self.head(x.flatten(2).mean(2))


# What is none.


class AttentionOverPositions(nn.Module):
    """CBAM's spatial half."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return x * torch.sigmoid(self.conv(seen))


class LayerNormScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight


class InstanceNormScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.var((2, 3), keepdim=True) + 1e-5)


class ResponseNorm(nn.Module):
    """ConvNeXt V2's."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + x * (size / (size.mean(1, keepdim=True) + 1e-6))


class ResidualScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.conv(x) * torch.sigmoid(self.scale)


class DynamicConvolution(nn.Module):
    """Branches, each with one factor for all of its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.routing = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        factors = torch.sigmoid(self.routing(x.mean((2, 3))))
        maps = torch.stack([conv(x) for conv in self.convs], 1)
        return (maps * factors[:, :, None, None, None]).sum(1)


class ConditionalWeights(nn.Module):
    """CondConv: the weights themselves are mixed by image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.routing = nn.Linear(channels, 3)
        self.weight = nn.Parameter(torch.randn(3, channels * channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        mixed = (torch.sigmoid(self.routing(x.mean((2, 3)))) @ self.weight).view(n * c, c, 1, 1)
        return F.conv2d(x.reshape(1, n * c, h, w), mixed, groups=n).view(n, c, h, w)


class SelectiveKernel(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 5, padding=2)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack((self.a(x), self.b(x)), 1)
        z = self.fc2(F.relu(self.fc1(maps.sum(1).mean((2, 3), keepdim=True))))
        choice = z.view(len(x), 2, -1, 1, 1).softmax(1)
        return (maps * choice).sum(1)


class TwoMaps(nn.Module):
    """A gated convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * torch.sigmoid(self.b(x))


class CoordinateAttention(nn.Module):
    """Gates from means over rows and over columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.sigmoid(self.rows(x.mean(3, keepdim=True)))
        return x * rows * torch.sigmoid(self.columns(x.mean(2, keepdim=True)))


class AdditiveAttention(nn.Module):
    """SwiftFormer's: keys times a context vector."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.w = nn.Parameter(torch.randn(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        query, key = self.q(tokens), self.k(tokens)
        context = (query @ self.w * query).sum(1, keepdim=True)
        return (context * key).transpose(1, 2).reshape(n, c, h, w)


class FirstPosition(nn.Module):
    """Gates from one token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.flatten(2)[:, :, 0]))[:, :, None, None]


class Activation(nn.Module):
    """Swish, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)
