"""A training step of (SE-)ResNet-50 and its memory; adds rows to benchmarks/results.csv.

python benchmarks/train_step.py [flags of `senet bench train`]
"""

import sys
from pathlib import Path

from senet.__main__ import main

if __name__ == "__main__":
    results = Path(__file__).with_name("results.csv")
    sys.exit(main(["bench", "train", "--results", str(results), *sys.argv[1:]]))
