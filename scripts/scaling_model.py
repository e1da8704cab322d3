"""Expected scaling of data-parallel training, computed: the tables of docs/cluster.md.

A ring all-reduce of B bytes over N GPUs sends 2·(N-1)/N·B through the slowest link, and takes
2·(N-1) latencies (the bandwidth-optimal algorithm, Patarasuk and Yuan 2009). DDP exchanges the
gradients in buckets of 25 MiB during the backward pass; what does not fit under it, and at least
the last bucket, is added to the step. Gradients are float32.

`python scripts/scaling_model.py --parameters 28.1e6 --step 0.18 --images 256` (seconds and images a
step and GPU, of your own measurement).
"""

import argparse

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
BUCKET = 25 * 2**20


def exchange_seconds(gpus: int, size: float, *, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce.

    Args:
        gpus: N.
        size: bytes.
        bandwidth: of the slowest link of the ring, bytes a second for each GPU.
        latency: seconds of one hop.
    """
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * (gpus - 1) * latency


def step_seconds(
    gpus: int, *, parameters: float, step: float, bandwidth: float, latency: float, overlap: float
) -> float:
    """Seconds of a step on that many GPUs.

    Args:
        gpus: N.
        parameters: float32 gradients to exchange.
        step: seconds of a step on one GPU.
        bandwidth: as for `exchange_seconds`.
        latency: as for `exchange_seconds`.
        overlap: share of the step (the backward pass) that all but the last bucket may hide under;
            0 hides nothing.
    """
    size = 4 * parameters
    whole, last = (
        exchange_seconds(gpus, each, bandwidth=bandwidth, latency=latency)
        for each in (size, min(size, BUCKET))
    )
    return step + max(whole - overlap * step, last)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, required=True)
    parser.add_argument("--step", type=float, required=True, help="seconds on one GPU")
    parser.add_argument("--images", type=int, required=True, help="images a step and GPU")
    parser.add_argument("--bandwidth", type=float, default=6.25e9, help="bytes/s for each GPU")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds a hop")
    parser.add_argument("--overlap", type=float, default=0.6, help="share of the step")
    given = parser.parse_args()
    network = {
        "parameters": given.parameters,
        "step": given.step,
        "bandwidth": given.bandwidth,
        "latency": given.latency,
    }
    print("| GPUs | step (ms) | images/s | efficiency | without overlap |")
    print("|---:|---:|---:|---:|---:|")
    for gpus in GPUS:
        seconds = step_seconds(gpus, overlap=given.overlap, **network)
        worst = step_seconds(gpus, overlap=0.0, **network)
        rate, share = gpus * given.images / seconds, 100 * given.step / seconds
        least = 100 * given.step / worst
        print(f"| {gpus} | {seconds * 1e3:.1f} | {rate:,.0f} | {share:.1f}% | {least:.1f}% |")


if __name__ == "__main__":
    main()
