"""How fast are 20,000 stays turned into episodes and sequences, on one core? Not part of the test run.

    python tests/benchmark_timeline.py FOLDER_OF_MIMIC_IV_DEMO [--stays 20000] [--make irregular]

Repeats the Sepsis-3 stays of the demo in memory under new names, then makes decision steps (62 features, 4 h), or
irregular sequences, of them, and prints the time and the peak memory.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from made_up import MemoryStore

from medsim.data.cohorts import Cohort, sepsis3
from medsim.data.features import SEPSIS_62
from medsim.data.store import extract
from medsim.data.timeline import decision_steps, irregular


def repeated(table: pd.DataFrame, ids: pd.Series, copies: int) -> pd.DataFrame:
    "The rows of the stays `ids`, `copies` times, each copy with stays and subjects of its own."
    own = table[table.stay_id.isin(ids)]
    number = np.searchsorted(np.sort(ids), own.stay_id)
    rows = pd.concat([own] * copies, ignore_index=True)
    stay_id = np.tile(number, copies) + np.repeat(np.arange(copies), len(own)) * len(ids)
    return rows.assign(stay_id=stay_id, **({"subject_id": stay_id} if "subject_id" in rows else {}))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("demo", type=Path)
    ap.add_argument("--stays", type=int, default=20_000)
    ap.add_argument("--make", choices=["decision_steps", "irregular"], default="decision_steps")
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        store = extract(a.demo, Path(tmp) / "store", progress=False)
        cohort = sepsis3(store)
        ids, copies = cohort.stays.stay_id, -(-a.stays // len(cohort))
        many = MemoryStore(*(repeated(t, ids, copies) for t in (store.stays, store.events(), store.interventions())))
        crowd = Cohort(cohort.name, repeated(cohort.stays, ids, copies).sort_values("stay_id"), cohort.flow)
    print(f"{len(crowd)} stays, {len(many.all_events) / 1e6:.1f} M events")
    start, cpu = time.perf_counter(), time.process_time()
    make = decision_steps if a.make == "decision_steps" else irregular
    made = make(many, crowd, features=SEPSIS_62)
    took, used = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{a.make}: {int(made.mask.sum())} rows in {took:.0f} s ({used:.0f} s of CPU), peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
