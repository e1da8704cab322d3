"""Decoding and augmentation a loader worker; adds rows to benchmarks/results.csv.

python benchmarks/data.py [flags of `senet bench data`]
"""

import sys
from pathlib import Path

from senet.__main__ import main

if __name__ == "__main__":
    results = Path(__file__).with_name("results.csv")
    sys.exit(main(["bench", "data", "--results", str(results), *sys.argv[1:]]))
