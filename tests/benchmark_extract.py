"""How fast is extraction, measured against decompressing the same files? Not part of the test run.

    python tests/benchmark_extract.py FOLDER_OF_MIMIC_III_DEMO [--copies 100] [--work FOLDER]

Replicates the MIMIC-III demo on disk (each copy with its own patients), extracts it in a process of its own, and prints
rows per second, the ratio to `zcat FILES | wc -l`, and the peak memory of the extracting process.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import duckdb

from medsim.data.sources import open_source

IDS = {"subject_id": 1_000_000, "hadm_id": 1_000_000, "icustay_id": 1_000_000}
CHILD = """
import json, resource, sys, time
from medsim.data.store import extract
start = time.time()
store = extract(sys.argv[1], sys.argv[2], progress=False)
print(json.dumps(dict(seconds=time.time() - start, rows=store.provenance["rows"],
                      peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)))
"""


def replicate(demo: Path, target: Path, copies: int) -> None:
    "Write `copies` copies of every table that extraction reads, ids shifted by a million a copy."
    target.mkdir(parents=True)
    con = duckdb.connect()
    for table in open_source(demo).tables.values():
        start = time.time()
        columns = [
            f"CAST(CAST({c} AS BIGINT) + k * {IDS[c.lower()]} AS VARCHAR) AS {c}" if c.lower() in IDS else c
            for c in table.columns
        ]
        read = f"read_csv('{table.path}', all_varchar=true, header=true, quote='\"', escape='\"')"
        con.execute(f"CREATE OR REPLACE TEMP TABLE one AS SELECT * FROM {read}")
        out, part = target / table.path.name, target / "part.csv"
        with out.open("wb") as whole:  # gzip members may follow each other in one file
            for k in range(copies):
                con.execute(f"""COPY (SELECT {", ".join(columns)} FROM (SELECT *, {k} AS k FROM one))
                                TO '{part}' (FORMAT csv, HEADER {k == 0})""")
                subprocess.run(["gzip", "-1", "-c", str(part)], stdout=whole, check=True)
        part.unlink()
        print(f"  {table.path.name}: {out.stat().st_size / 1e6:.0f} MB, {time.time() - start:.0f} s", flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("demo", type=Path)
    ap.add_argument("--copies", type=int, default=100)
    ap.add_argument("--work", type=Path, default=Path("runs/benchmark_extract"))
    a = ap.parse_args()
    big = a.work / f"mimic-iii-x{a.copies}"
    if not big.exists():
        print(f"replicating the demo x{a.copies} into {big}")
        replicate(a.demo, big, a.copies)
    files = [t.path for t in open_source(big).tables.values()]

    start = time.time()
    listed = " ".join(f"'{f}'" for f in files)
    lines = int(subprocess.run(f"zcat {listed} | wc -l", shell=True, capture_output=True, check=True).stdout)
    zcat = time.time() - start
    print(f"zcat | wc -l: {lines:,} lines of {len(files)} files in {zcat:.0f} s")

    out = a.work / "store"
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run([sys.executable, "-c", CHILD, str(big), str(out)], capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    r = json.loads(done.stdout.splitlines()[-1])
    print(f"extract: {r['seconds']:.0f} s, {lines / r['seconds'] / 1e6:.2f} million rows a second, "
          f"{r['seconds'] / zcat:.2f} x zcat, peak memory {r['peak_gib']:.2f} GiB, kept {r['rows']}")


if __name__ == "__main__":
    main()
