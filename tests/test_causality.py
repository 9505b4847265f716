"""No state sees the future: change every record after a decision, and that decision's state must not change by one bit.

Once in the event stores of three real sources, and once in the raw tables themselves, read and cleaned again.
"""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medsim.core.paths import sample_folder
from medsim.data.cohorts import Cohort, all_adults
from medsim.data.features import MEDDREAMER_40, MEDGYM_6, SEPSIS_62
from medsim.data.store import EventStore, extract
from medsim.data.timeline import decision_steps

FEATURES = {"sepsis": SEPSIS_62, "meddreamer": MEDDREAMER_40, "medgym": MEDGYM_6}


def states(store: EventStore, cohort: Cohort, features, normaliser=None):
    return decision_steps(store, cohort, window_h=(0, 48), features=features, normaliser=normaliser)


def disturbed(store: EventStore, cut: pd.Series, seed: int, folder: Path) -> EventStore:
    "The store with every record available at or after its stay's `cut` changed, dropped or added to."
    rng = np.random.default_rng(seed)
    events, given = store.events(), store.interventions()
    cut = cut.reindex(store.stays.stay_id).fillna(np.inf)
    at = cut[events.stay_id].to_numpy()
    late = events.available_h.to_numpy() >= at
    events = events.astype({"variable": str, "item": str})
    events.loc[late, "value"] = events.value[late] * rng.uniform(0.2, 5, late.sum()) + 1
    shift = rng.uniform(0, 6, late.sum())  # a late record may even have been measured earlier than it was
    earlier = events.time_h[late] - rng.choice([0, 3], late.sum())
    events.loc[late, "time_h"] = np.minimum(earlier, events.available_h[late])
    events.loc[late, "available_h"] += shift
    extra = events[late].sample(frac=0.3, random_state=seed).assign(value=lambda d: d.value + 7)
    events = pd.concat([events[~(late & (rng.random(len(events)) < 0.2))], extra])
    at = cut[given.stay_id].to_numpy()
    given = given.astype({"variable": str, "item": str})
    late = given.start_h.to_numpy() >= at
    given.loc[late, "rate"] *= rng.uniform(0.1, 9, late.sum())
    running = ~late & (given.end_h.to_numpy() > at)  # begun before, ends after: its end and amount are of the future
    given.loc[running, "end_h"] = at[running] + rng.uniform(0, 20, running.sum())
    given.loc[running, "amount"] *= rng.uniform(0.1, 9, running.sum())
    given = given[~(late & (rng.random(len(given)) < 0.3))]
    return EventStore.write(folder, store.stays, events, given, store.provenance)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("source", ["mimic4_store", "mimic3_store", "eicu_store", "sample_store"])
def test_states_of_real_stores_ignore_the_future(source, features, request, tmp_path):
    store = request.getfixturevalue(source)
    cohort = all_adults(store)
    if len(cohort) > 150:  # enough stays to disturb, few enough to be quick
        cohort = Cohort(cohort.name, cohort.stays.iloc[::8].reset_index(drop=True), cohort.flow, cohort.open_data)
    base = states(store, cohort, FEATURES[features])
    length = base.mask.sum(1)
    k = np.random.default_rng(7).integers(0, length)  # one decision of every stay
    before = np.cumsum(base.dt, axis=1) - base.dt
    decision_h = base.ids.start_h.to_numpy() + before[np.arange(len(k)), k]
    other = disturbed(store, pd.Series(decision_h, base.ids.stay_id), 3, tmp_path / "store")
    again = states(other, cohort, FEATURES[features], base.normaliser)
    upto = np.arange(base.mask.shape[1]) <= k[:, None]
    assert np.array_equal(base.ids.stay_id, again.ids.stay_id)
    assert np.array_equal(base.obs[upto], again.obs[upto])
    after = base.mask & ~upto
    assert not np.array_equal(base.obs[after], again.obs[after]), "the disturbance must reach later states"


def rewrite(path: Path, change) -> None:
    "Change a CSV table in place, everything read and written as text."
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    change(table)
    with gzip.open(path, "wt", newline="") as f:
        table.to_csv(f, index=False)


def test_states_ignore_the_future_of_the_raw_tables(tmp_path):
    "Weights, units, specimens, comorbidity: what extraction itself derives must not look ahead either."
    raw, hours = tmp_path / "raw", 20.0
    shutil.copytree(sample_folder(), raw)
    stays = pd.read_csv(raw / "icu/icustays.csv.gz", parse_dates=["intime", "outtime"]).sort_values("intime")
    first = stays.drop_duplicates("subject_id").set_index("subject_id")
    cut = first.intime + pd.Timedelta(hours=hours)

    def late(table: pd.DataFrame, *columns: str) -> pd.Series:
        "Rows of which the last of the given times is at or after the patient's cut."
        times = pd.concat([pd.to_datetime(table[c], errors="coerce") for c in columns], axis=1).max(axis=1)
        return times >= table.subject_id.astype(int).map(cut)

    def scaled(table: pd.DataFrame, rows: pd.Series, column: str, factor: float) -> None:
        rows = rows & (table[column] != "")
        table.loc[rows, column] = (table.loc[rows, column].astype(float) * factor).astype(str)

    def charted(t: pd.DataFrame) -> None: scaled(t, late(t, "charttime"), "valuenum", 1.3)

    def labs(t: pd.DataFrame) -> None: scaled(t, late(t, "charttime", "storetime"), "valuenum", 1.7)

    def outputs(t: pd.DataFrame) -> None: scaled(t, late(t, "charttime"), "value", 2.0)

    def inputs(t: pd.DataFrame) -> None:
        future = late(t, "starttime")
        scaled(t, future, "rate", 3.0)
        scaled(t, future, "amount", 3.0)
        scaled(t, future, "patientweight", 1.2)

    def orders(t: pd.DataFrame) -> None: t.loc[late(t, "starttime"), "drug"] = "Something else"

    for file, change in {
        "icu/chartevents": charted, "hosp/labevents": labs, "icu/outputevents": outputs, "icu/inputevents": inputs,
        "hosp/prescriptions": orders,
    }.items():  # fmt: skip
        rewrite(raw / f"{file}.csv.gz", change)
    base = extract(sample_folder(), tmp_path / "base", progress=False)
    other = extract(raw, tmp_path / "other", progress=False)
    cohort = all_adults(base)
    mine = cohort.stays[cohort.stays.stay_id.isin(first.stay_id)].reset_index(drop=True)
    cohort = Cohort(cohort.name, mine, cohort.flow, cohort.open_data)
    for features in FEATURES.values():
        a = states(base, cohort, features)
        b = states(other, cohort, features, a.normaliser)
        at = a.ids.start_h.to_numpy()[:, None] + np.cumsum(a.dt, axis=1) - a.dt
        upto = a.mask & (at <= hours)
        assert np.array_equal(a.obs[upto], b.obs[upto])
        assert not np.array_equal(a.obs[a.mask & ~upto], b.obs[a.mask & ~upto])
