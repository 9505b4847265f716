"""A thousand replicates of a patient bootstrap, all estimators by weights. Not part of the test run.

    python tests/benchmark_ope.py [--episodes 20000] [--steps 20] [--replicates 1000]

Aim: under 10 s and 2 GiB on two cores.
"""

import argparse
import os
import resource
import time

import numpy as np

from medsim.ope.doubly_robust import robust_sums
from medsim.ope.estimate import multiplicities
from medsim.ope.importance import sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--replicates", type=int, default=1_000)
    asked = parser.parse_args()
    rng, shape = np.random.default_rng(0), (asked.episodes, asked.steps)
    mask = np.arange(asked.steps) < rng.integers(1, asked.steps + 1, asked.episodes)[:, None]
    ratio, reward, q, v = np.exp(rng.normal(0, 0.2, shape)), *(rng.normal(size=shape) for _ in range(3))
    for name, make in (("IS WIS PDIS WPDIS CWPDIS", lambda: sums(ratio, reward, mask, 0.99)),
                       ("DM DR WDR", lambda: robust_sums(ratio, reward, mask, q, v, 0.99))):
        begin, cpu = time.perf_counter(), time.process_time()
        whole = make()
        found = [whole.values(counts) for counts in multiplicities(asked.episodes, asked.replicates, 0)]
        n = sum(len(next(iter(f.values()))) for f in found)
        print(f"{name}: {n} replicates of {asked.episodes} x {asked.steps} in {time.perf_counter() - begin:.1f} s "
              f"({time.process_time() - cpu:.1f} s of CPU)", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__": main()
