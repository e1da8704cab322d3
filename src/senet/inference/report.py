"""What `optimize` did, and what it gained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ORIGINAL, CHANNELS_LAST, OPTIMIZED = "original", "original in channels_last", "optimized"
FUSED = "fused"


@dataclass(frozen=True)
class OptimizationReport:
    """What `optimize` did, and what it gained.

    Attributes:
        fused: per rewrite the module it starts from, and what was done.
        left: modules that were left as they are, and why.
        difference: largest difference of the outputs from the original model's for the example,
            relative to the largest output.
        kernels: instruction set of the C++ kernels, or the reason why there are none.
        blocks: each SE block that `senet.anatomy` finds, and "fused" or why it is not.
        operations: by operation, how many of the optimized network run in PyTorch, between the
            kernels, for the example.
        milliseconds: median time of the example in the original as it is, in the original with
            channels last, and in the optimized network; empty where nothing was measured.
        kept: which of them the network is now: the fastest.
        slower: parts that are as they were, because they were faster so, with the times in
            milliseconds before and after.
        outside: by operation, the share of the optimized network's time that runs outside of the
            kernels, largest first; empty where nothing was measured.
    """

    fused: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    difference: float
    kernels: str
    blocks: Mapping[str, str] = field(default_factory=dict)
    operations: Mapping[str, int] = field(default_factory=dict)
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    kept: str = OPTIMIZED
    slower: tuple[tuple[str, float, float], ...] = ()
    outside: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.fused]
        lines += [f"{name}: left as it is ({why})" for name, why in self.left]
        for name, before, after in self.slower:
            lines.append(f"{name}: left as it was ({before:.3g} ms, optimized {after:.3g} ms)")
        lines += self.summary()
        return "\n".join(lines)

    def summary(self) -> list[str]:
        """Lines about the whole network: SE blocks, difference, kernels and times."""
        lines = []
        if self.blocks:
            fused = sum(what == FUSED for what in self.blocks.values())
            lines.append(f"SE blocks: {fused} of {len(self.blocks)} fused")
            for name, what in self.blocks.items():
                if what != FUSED:
                    lines.append(f"SE block {name}: not fused ({what})")
        lines.append(f"largest relative difference from the original: {self.difference:.1e}")
        lines.append(f"C++ kernels: {self.kernels}")
        counts = [f"{name} ({count})" for name, count in self.operations.items()]
        lines.append(f"outside of the kernels: {', '.join(counts) or 'nothing'}")
        if self.milliseconds:
            times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in self.milliseconds.items())
            lines.append(f"time of the example: {times}; kept: {self.kept}")
            shares = [f"{name} {share:.1%}" for name, share in self.outside.items()]
            if shares:
                total = f"{sum(self.outside.values()):.1%}"
                what = ", ".join(shares)
                lines.append(f"of the optimized time outside of the kernels: {total} ({what})")
        return lines
