"""The operators against timm's and torchvision's modules; adds rows to benchmarks/results.csv.

python benchmarks/ops.py [flags of `senet bench ops`]
"""

import sys
from pathlib import Path

from senet.__main__ import main

if __name__ == "__main__":
    results = Path(__file__).with_name("results.csv")
    sys.exit(main(["bench", "ops", "--results", str(results), *sys.argv[1:]]))
