"The synthetic cohort: made alike from one seed, in the layout of the demo, read back like any other."
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medsim.data.store import extract
from medsim.sim.course import SEEN, level_probabilities, targets
from medsim.sim.mimic_layout import COLUMNS
from medsim.sim.synthetic import pressors, write_cohort

SAMPLE = Path(__file__).parents[1] / "data_samples"


def test_pressors_add_up():
    dose, habit = np.meshgrid([0, 0.05, 0.1, 0.25, 0.5], np.arange(5))
    r = pressors(dose, habit)
    share = dict(norepinephrine=1, epinephrine=1, phenylephrine=1 / 10, dopamine=1 / 100, vasopressin=2.5 / 60)
    total = sum(r[drug] * weight for drug, weight in share.items())
    assert np.allclose(total, dose) and min(v.min() for v in r.values()) >= 0


def test_same_seed_same_bytes(tmp_path):
    sums = [(write_cohort(tmp_path / n, n_patients=6, seed=3, hours=24) / "SHA256SUMS").read_text() for n in "ab"]
    assert sums[0] == sums[1]
    with pytest.raises(ValueError, match="not empty"):
        write_cohort(tmp_path / "a")


def test_sample_is_what_was_recorded():
    listed = dict(line.split("  ")[::-1] for line in (SAMPLE / "SHA256SUMS").read_text().splitlines())
    assert {f"{name}.csv.gz" for name in COLUMNS} | {"truth/course.npz", "truth/cohort.json"} == set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((SAMPLE / name).read_bytes()).hexdigest() == digest, name
    assert sum(f.stat().st_size for f in SAMPLE.rglob("*") if f.is_file()) < 5e6
    config = json.loads((SAMPLE / "truth/cohort.json").read_text())["config"]
    assert f"n_patients={config['n_patients']}, seed={config['seed']}" in (SAMPLE / "README.md").read_text()


def test_sample_holds_together():
    def read(name, **kw):
        return pd.read_csv(SAMPLE / f"{name}.csv.gz", **kw)

    stays = read("icu/icustays", parse_dates=["intime", "outtime"])
    people, stay_times = read("hosp/patients"), stays.set_index("stay_id")
    assert people.anchor_age.min() >= 18 and stays.subject_id.nunique() == len(people) < len(stays)
    assert not stays.hadm_id.is_unique  # a second stay of one hospital admission
    for name, start, end in (("input", "starttime", "endtime"), ("chart", "charttime", "charttime")):
        rows = read(f"icu/{name}events", parse_dates=[start, end]).join(stay_times[["intime", "outtime"]], on="stay_id")
        assert (rows[start] >= rows.intime).all() and (rows[end] <= rows.outtime).all()
    labs = read("hosp/labevents", parse_dates=["charttime", "storetime"])
    assert (labs.storetime >= labs.charttime).all() and set(labs.itemid) <= set(read("hosp/d_labitems").itemid)
    items = set(read("icu/d_items").itemid)
    assert all(set(read(f"icu/{n}events").itemid) <= items for n in ("chart", "input", "output", "procedure"))


def test_layout_is_that_of_the_demo():
    root = os.environ.get("MEDSIM_DATA")
    demo = Path(root or "", "mimic-iv-demo")
    if not root or not demo.is_dir():
        pytest.skip("MEDSIM_DATA is unset or holds no mimic-iv-demo/")
    for name, columns in COLUMNS.items():
        real = list(pd.read_csv(demo / f"{name}.csv.gz", nrows=0))
        assert columns == real, name


def test_the_clinician_saw_only_the_record(tmp_path):
    "FiO2 and vasopressor probabilities follow from what the reader says was known before each decision."
    store = extract(SAMPLE, tmp_path / "store", progress=False)
    truth = np.load(SAMPLE / "truth/course.npz")
    events = store.events(["spo2", "map", "lactate"]).sort_values("available_h")
    i, t = np.nonzero(4 * np.arange(truth["level"].shape[1]) < truth["out_h"][:, None])
    decisions = pd.DataFrame(dict(stay_id=truth["stay_id"][i], hour=4.0 * t, i=i, t=t))
    seen = []
    for name, default in SEEN.items():
        rows = events[(events.variable == name)].sort_values(["stay_id", "time_h"])
        last = decisions.merge(rows, on="stay_id", how="left")
        last = last[last.available_h < last.hour - 1e-6].groupby(["i", "t"]).value.last()
        seen.append(last.reindex(pd.MultiIndex.from_frame(decisions[["i", "t"]])).fillna(default).to_numpy())
    oxygen = np.where(t > 0, truth["level"][i, np.maximum(t - 1, 0), 0], 1)
    expected = level_probabilities(targets(np.column_stack(seen), oxygen))[:, :2]
    assert np.allclose(expected, truth["probability"][i, t, :2], atol=1e-4)
