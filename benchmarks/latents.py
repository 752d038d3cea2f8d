"""False alarms of MOP on Gaussian latents, and time and memory of MOP and CSI on a million latents.

python benchmarks/latents.py [--seed 0]
"""

import argparse
import resource
import time
import warnings
from collections.abc import Callable

import numpy as np

from inform_rm.errors import InputError
from inform_rm.eval.outliers import cluster_separation_index, mahalanobis_outlier_probability

DIMENSIONS, ALPHA = 128, 0.01
SPECTRA = {
    "equal": np.ones(DIMENSIONS),
    "1, 1/2, 1/3, ...": 1 / np.arange(1, DIMENSIONS + 1),
    "8 wide, 120 at 1e-4": np.r_[np.ones(8), np.full(DIMENSIONS - 8, 1e-4)],
}
REFERENCE_SIZES = (110, 256, 1024, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    rng = np.random.default_rng(parser.parse_args().seed)
    warnings.simplefilter("ignore")  # that chi2 is not to be trusted there is what the table shows
    print(
        f"share of 20,000 latents of the reference's own Gaussian called outliers at alpha {ALPHA}, K = {DIMENSIONS}\n"
    )
    print("| variances | tail | " + " | ".join(f"M = {size}" for size in REFERENCE_SIZES) + " |")
    print("|" + "---|" * (2 + len(REFERENCE_SIZES)))
    for name, variances in SPECTRA.items():
        shares: dict[str, list[str]] = {"chi2": [], "reference": []}
        for size in REFERENCE_SIZES:
            reference = rng.normal(size=(size, DIMENSIONS)) * np.sqrt(variances)
            candidate = rng.normal(size=(20_000, DIMENSIONS)) * np.sqrt(variances)
            for tail, cells in shares.items():
                try:
                    share = mahalanobis_outlier_probability(candidate, reference, alpha=ALPHA, tail=tail)
                    cells.append(f"{share:.4f}")
                except InputError:
                    cells.append("refused")
        for tail, cells in shares.items():
            print("| " + " | ".join([name, tail, *cells]) + " |")
    candidate = rng.standard_normal((1_000_000, DIMENSIONS), dtype=np.float32)
    reference = rng.standard_normal((100_000, DIMENSIONS), dtype=np.float32)
    print("\n1,000,000 candidate and 100,000 reference latents\n")
    print("| | value | seconds | GiB over the arrays' |\n|---|---|---|---|")
    measure("MOP", lambda: mahalanobis_outlier_probability(candidate, reference))
    measure(
        "CSI, eps auto, normalized",
        lambda: cluster_separation_index(candidate, reference, eps="auto", normalized=True),
    )


def measure(name: str, run: Callable[[], float]) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    value = run()
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"| {name} | {value:.4f} | {seconds:.1f} | {grown:.2f} |", flush=True)


if __name__ == "__main__":
    main()
