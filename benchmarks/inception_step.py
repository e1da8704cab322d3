"""What SE costs a training step of Inception-v3; adds rows to benchmarks/results.csv.

python benchmarks/inception_step.py
"""

import sys
from pathlib import Path

from senet.support.allocator import tune_allocator

BATCH, SIZE, ROUNDS, WARMUP = 8, 299, 15, 1


def main() -> None:
    tuned = tune_allocator().applied
    from senet.bench import timing
    from senet.bench.train import training_step
    from senet.cli.bench import results_table
    from senet.cli.tables import print_table
    from senet.networks.create import create_model

    def contestants() -> list[timing.Contestant]:
        return [
            timing.Contestant(
                f"senet {name}", training_step(create_model(name), BATCH, image_size=SIZE)
            )
            for name in ("se_inception_v3", "inception_v3")
        ]

    case = timing.Case("training step", f"Inception-v3, batch {BATCH}", contestants)
    measured = timing.measure(case, rounds=ROUNDS, warmup=WARMUP)
    where = timing.environment(f"python {sys.argv[0]}", "tuned" if tuned else "untuned")
    timing.append_results(Path(__file__).with_name("results.csv"), measured, where)
    print_table(results_table(measured))


if __name__ == "__main__":
    main()
