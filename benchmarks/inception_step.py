"""What SE costs a training step of Inception-v3; adds rows to benchmarks/results.csv.

python benchmarks/inception_step.py
"""

import sys
from pathlib import Path

from senet.allocator import tune_allocator

BATCH, SIZE, ROUNDS, WARMUP = 8, 299, 15, 1


def main() -> None:
    tuned = tune_allocator().applied
    from senet import benchmark
    from senet.benchmark_train import training_step
    from senet.factory import create_model
    from senet.units import print_table

    def contestants() -> list[benchmark.Contestant]:
        return [
            benchmark.Contestant(
                f"senet {name}", training_step(create_model(name), BATCH, image_size=SIZE)
            )
            for name in ("se_inception_v3", "inception_v3")
        ]

    case = benchmark.Case("training step", f"Inception-v3, batch {BATCH}", contestants)
    measured = benchmark.measure(case, rounds=ROUNDS, warmup=WARMUP)
    where = benchmark.environment(f"python {sys.argv[0]}", "tuned" if tuned else "untuned")
    benchmark.append_results(Path(__file__).with_name("results.csv"), measured, where)
    print_table(benchmark.results_table(measured))


if __name__ == "__main__":
    main()
