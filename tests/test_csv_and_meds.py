"""One demo, two public editions: MIMIC-IV as CSV and as MEDS give the same stays and, item by item, the same values.

Every difference is counted and has a cause that can be seen in the source."""

import duckdb
import numpy as np
import pandas as pd
import pytest

from medsim.data.sources import open_source
from medsim.data.store import EventStore

BLOOD_GAS = {"base_excess", "paco2", "pao2", "ph", "sao2"}  # whose specimen is told by a word: MEDS has no words here


def numbered(folder) -> pd.Series:
    "Stay id of the CSV -> stay id of MEDS: the patient's number and the rank of the stay."
    icu = pd.read_csv(folder / "icu" / "icustays.csv.gz", parse_dates=["intime"]).sort_values(["subject_id", "intime"])
    return pd.Series((icu.subject_id * 100 + icu.groupby("subject_id").cumcount() + 1).to_numpy(), icu.stay_id)


def keyed(rows: pd.DataFrame, times: list[str], values: list[str], ids: pd.Series | None) -> pd.DataFrame:
    "Rows as a multiset of plain keys: whole seconds, five significant digits (MEDS keeps single precision)."
    key = pd.DataFrame({c: rows[c].astype(object) for c in ("variable", "item")})
    key["stay_id"] = rows.stay_id if ids is None else rows.stay_id.map(ids)
    for c in times:
        key[c] = (rows[c] * 3600).round().astype("int64")
    for c in values:
        key[c] = [f"{v:.5g}" for v in rows[c]]
    return key.assign(n=key.groupby(list(key), dropna=False).cumcount())


def joined(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    both = a.merge(b, how="outer", indicator="where")
    names = dict(both="both", left_only="csv", right_only="meds")
    return both.assign(where=both["where"].astype(object).map(names))


@pytest.fixture(scope="module")
def ids(mimic4_demo) -> pd.Series:
    return numbered(mimic4_demo)


@pytest.fixture(scope="module")
def events(mimic4_store, meds_store, ids) -> pd.DataFrame:
    "Values of both editions at the time they were measured or drawn."
    stores = ((mimic4_store, ids), (meds_store, None))
    return joined(*(keyed(s.events(), ["time_h"], ["value"], i) for s, i in stores))


def infusions(store: EventStore, ids: pd.Series | None) -> pd.DataFrame:
    rows = store.interventions()
    rows = rows[rows.variable != "antibiotic"].sort_values(["stay_id", "start_h", "end_h", "amount"])
    return keyed(rows, ["start_h", "end_h"], [], ids).assign(rate=rows.rate, amount=rows.amount)


@pytest.fixture(scope="module")
def given(mimic4_store, meds_store, ids) -> pd.DataFrame:
    "Intervals of both editions; equal are those with the same start, end, rate and amount."
    a, b = infusions(mimic4_store, ids), infusions(meds_store, None)
    key = [c for c in a if c not in ("rate", "amount")]
    both = a.merge(b, how="outer", on=key, suffixes=("", "_meds"), indicator="where")
    names = dict(both="both", left_only="csv", right_only="meds")
    where = both["where"].astype(object).map(names)
    near = np.isclose(both.rate, both.rate_meds, rtol=1e-4) & np.isclose(both.amount, both.amount_meds, rtol=1e-4)
    return both.assign(where=where.where(near | (where != "both"), "differs"))


def count(rows: pd.DataFrame) -> dict[str, int]:
    return rows["where"].value_counts().to_dict()


def test_the_same_stays(mimic4_store, meds_store, ids):
    a = mimic4_store.stays.assign(stay_id=mimic4_store.stays.stay_id.map(ids)).set_index("stay_id").sort_index()
    b = meds_store.stays.set_index("stay_id").sort_index()
    assert len(a) == 140 and a.index.equals(b.index)
    for column in (
        "subject_id",
        "age_years",
        "sex",
        "out_h",
        "hospital_out_h",
        "hospital_death",
        "unit",
        "readmission",
    ):
        assert a[column].equals(b[column]) or (a[column] == b[column]).all(), column
    # one hadm_id for one hadm_id, though MEDS knows no such number
    assert (
        len(pd.DataFrame(dict(a=a.hadm_id, b=b.hadm_id)).drop_duplicates())
        == a.hadm_id.nunique()
        == b.hadm_id.nunique()
    )


def test_the_same_deaths(mimic4_store, meds_store, ids):
    a = mimic4_store.stays.assign(stay_id=mimic4_store.stays.stay_id.map(ids)).set_index("stay_id").death_h.sort_index()
    b = meds_store.stays.set_index("stay_id").death_h.sort_index()
    assert a.notna().equals(b.notna()) and a.notna().sum() > 40
    assert np.allclose(a.dropna(), b.dropna(), atol=1e-6)


def test_charted_values_are_the_same(events):
    rows = events[events["item"].str.startswith(("chartevents", "outputevents", "procedureevents", "diagnoses_icd"))]
    assert count(rows) == {"both": len(rows)} and len(rows) > 130_000


def test_laboratory_values_are_the_same(events):
    """Apart from the specimen of a blood gas, which needs a word, and five numbers that stand twice at one draw time.

    Those five come from two tubes, told apart in the CSV by their result times; in MEDS they are the same row twice."""
    rows = events[events["item"].str.startswith("labevents") & ~events.variable.isin(BLOOD_GAS)]
    assert len(rows) > 25_000 and count(rows) == {"both": len(rows) - 5, "csv": 5}
    assert (rows[rows["where"] == "csv"].n == 1).all()


def venous(folder) -> dict[str, int]:
    "Numbers of blood gases near a stay whose specimen is charted, and is not arterial, by item."
    tables = open_source(folder).tables
    labs = tables["labevents"].read(
        subject_id="BIGINT",
        specimen_id="BIGINT",
        itemid="INTEGER",
        charttime="TIMESTAMP",
        value="VARCHAR",
        valuenum="DOUBLE",
    )
    icu = tables["icustays"].read(subject_id="BIGINT", stay_id="BIGINT", intime="TIMESTAMP", outtime="TIMESTAMP")
    with duckdb.connect() as con:
        rows = con.execute(f"""
            WITH other AS (SELECT specimen_id FROM {labs} WHERE itemid = 52033 AND value IS NOT NULL
                           GROUP BY 1 HAVING NOT bool_or(upper(value) LIKE 'ART%'))
            SELECT itemid, count(DISTINCT (stay_id, l.subject_id, charttime, valuenum)) FROM {labs} l
            JOIN other USING (specimen_id) JOIN {icu} i ON l.subject_id = i.subject_id
                AND charttime BETWEEN intime - INTERVAL 72 HOUR AND outtime + INTERVAL 24 HOUR
            WHERE valuenum IS NOT NULL AND itemid IN (50802, 50817, 50818, 50820, 50821) GROUP BY 1""").fetchall()
    return {f"labevents:{i}": n for i, n in rows}


def test_blood_gases_differ_by_the_venous_specimens(events, mimic4_demo):
    "MEDS without text values cannot tell an arterial gas from a venous one, so all are kept there."
    rows = events[events["item"].str.startswith("labevents") & events.variable.isin(BLOOD_GAS)]
    assert (rows["where"] != "csv").all()
    more = rows[rows["where"] == "meds"]["item"].value_counts().to_dict()
    expected = venous(mimic4_demo)
    assert set(more) == set(expected)
    for item, n in expected.items():
        assert n - 2 <= more[item] <= n, (item, more[item], n)  # two equal numbers of two specimens fall together
    assert sum(more.values()) == 724


def test_cultures_are_in_the_csv_alone(events):
    rows = events[events["item"].str.startswith("microbiologyevents")]
    assert count(rows) == {"csv": 634}


def test_no_other_event_differs(events):
    counts = count(events)
    assert counts["csv"] == 634 + 5 and counts["meds"] == 724 and counts["both"] > 160_000


def test_the_time_of_a_result(mimic4_store, meds_store, ids):
    """Laboratory rows of this MEDS edition stand at draw time, with no result time: the vocabulary's delay is assumed.

    So nothing of it is known before it was measured, and each is marked as assumed; the CSV has the time stored."""
    csv, meds = (s.events() for s in (mimic4_store, meds_store))
    csv, meds = (e[e["item"].str.startswith("labevents") & (e.variable == "creatinine")] for e in (csv, meds))
    recorded, assumed = csv.available_h - csv.time_h, meds.available_h - meds.time_h
    assert np.allclose(assumed, 1.8) and recorded.std() > 0.5 and 0.5 < recorded.median() < 3
    assert meds_store.provenance["account"]["assumed"]["result time"]["creatinine"]["rows"] == len(meds)
    assert "creatinine" not in mimic4_store.provenance["account"]["assumed"]["result time"]


AGENTS = ("norepinephrine", "epinephrine", "phenylephrine", "dopamine", "vasopressin", "dobutamine", "milrinone")


def test_vasopressors_are_the_same(given):
    rows = given[given.variable.isin(AGENTS)]
    assert count(rows) == {"both": 1_748}


def test_ventilation_is_the_same(given):
    "But for one procedure over the gap between two stays: the CSV has its stay id, MEDS goes by the clock."
    rows = given[given.variable.isin(["invasive_ventilation", "noninvasive_ventilation"])]
    assert count(rows) == {"both": 72, "csv": 1, "meds": 1}


def test_fluids_have_the_same_volumes(given, mimic4_store, meds_store, ids):
    "Start, end and amount: the two ends of an infusion are separate rows in MEDS, and are put together again."
    rows = given[given.variable.isin(["crystalloid", "colloid", "dextrose", "blood_product"])]
    assert count(rows) == {"both": 7_597, "csv": 4, "meds": 4}  # four ends that fit two starts

    def total(store, ids=None):
        rows = store.interventions(["crystalloid", "colloid", "dextrose", "blood_product"])
        stay = rows.stay_id if ids is None else rows.stay_id.map(ids)
        return rows.amount.groupby([stay, rows["item"].astype(str)]).sum()

    a, b = total(mimic4_store, ids), total(meds_store)
    assert a.index.equals(b.index) and np.allclose(a, b, rtol=1e-4)


def test_antibiotics_given_in_the_unit_are_the_same(mimic4_store, meds_store, ids):
    "Items of the infusion table; orders (CSV) and administrations (MEDS) of the pharmacy are different records."

    def rows(store, ids):
        found = store.interventions("antibiotic")
        found = found[found["item"].str.startswith("inputevents")]
        return keyed(found, ["start_h", "end_h"], [], ids)

    both = joined(rows(mimic4_store, ids), rows(meds_store, None))
    assert count(both) == {"both": 1_095}
