"""The allocator setting, in processes of its own."""

import platform
import subprocess
import sys

import pytest

from senet.support import allocator

FAULTS = """
import resource, sys, torch
from senet.support.allocator import tune_allocator
if sys.argv[1] == "tuned":
    assert tune_allocator().applied
least = None
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(16 << 20)  # beyond the 32 MiB up to which glibc adapts by itself
    del x
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    least = faults if least is None else min(least, faults)
print(least)
"""


def fewest_faults(how):
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is tuned")
def test_freed_maps_are_used_again_without_page_faults():
    assert fewest_faults("tuned") < 100 < fewest_faults("untuned")


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    tuning = allocator.tune_allocator()
    assert not tuning.applied
    assert "only glibc's allocator is tuned" in tuning.reason
