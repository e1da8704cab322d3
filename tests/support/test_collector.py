"""Imports without the garbage collector, in a process of its own."""

import subprocess
import sys

SCRIPT = """
import gc
from senet.support.collector import importing
kept = []
for _ in range(2):
    collections = [each["collections"] for each in gc.get_stats()]
    with importing():
        before = gc.get_freeze_count()
        kept += [[] for _ in range(20_000)]
        assert [each["collections"] for each in gc.get_stats()] == collections
    assert gc.isenabled() and gc.get_freeze_count() >= 20_000
    assert not before or gc.get_freeze_count() < before + 20_000  # once
    gc.collect()
gc.disable()
with importing():
    pass
assert not gc.isenabled()
try:
    with importing():
        raise ImportError
except ImportError:
    assert not gc.isenabled()
"""


def test_nothing_is_collected_and_what_is_there_is_set_aside_once() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
