"""Inference of SE networks against all peers; adds rows to benchmarks/results.csv.

    python benchmarks/inference.py [--models a,b] [--batch-sizes 1,16] [--rounds N]
        [--engines senet.export,eager,torch.compile,ONNX Runtime,OpenVINO] [--no-plain-peers]

Every contestant has PyTorch's number of threads (OMP_NUM_THREADS) and glibc's allocator tuned.
"""

import argparse
import functools
import shlex
import sys
from pathlib import Path

from senet.support.allocator import tune_allocator

RESULTS = Path(__file__).with_name("results.csv")


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="se_resnet50", help="names with commas between them")
    parser.add_argument("--batch-sizes", type=whole_numbers, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--engines", default=None, help="with commas between them; all by default")
    parser.add_argument(
        "--no-plain-peers", action="store_true", help="peers run the network with SE only"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    tuned = tune_allocator().applied
    from senet.bench import inference as bench_inference
    from senet.bench import timing
    from senet.cli.bench import results_table
    from senet.cli.tables import print_table

    timing.check_rounds(given.rounds, given.warmup)
    names = given.models.split(",")
    cases = bench_inference.cases(
        names,
        given.batch_sizes,
        engines=given.engines.split(",") if given.engines else bench_inference.ENGINES,
        plain_peers=not given.no_plain_peers,
    )
    command = shlex.join(["python", *sys.argv])
    found = []
    for measured in timing.run_cases(
        cases,
        rounds=given.rounds,
        warmup=given.warmup,
        advance=functools.partial(print, flush=True),
    ):
        where = timing.environment(command, "tuned" if tuned else "untuned")
        timing.append_results(given.results, measured, where)
        found += measured
    print_table(results_table(found))
    print(*bench_inference.conclusions(found), sep="\n")


if __name__ == "__main__":
    main()
