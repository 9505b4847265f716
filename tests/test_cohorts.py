"Cohorts: suspicion of infection, Sepsis-3, ventilation, and the flow of those left out."

import numpy as np
import pandas as pd
import pytest
from crowd import EVENT_COLUMNS, GIVEN_COLUMNS, Frames, crowd_events, frame
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.data import cohorts as co
from medsim.data.store import EventStore, extract

N = 80
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def people(n=N, **columns):
    return pd.DataFrame(dict(stay_id=range(n), subject_id=range(n), age_years=60.0, out_h=50.0)).assign(**columns)


def crowd(rng):
    "Random cultures, antibiotics and laboratory values of N stays."
    rows = crowd_events(rng, N, 8 * N)
    labs = rows.assign(variable=rng.choice(["creatinine", "platelets", "bilirubin_total", "culture"], len(rows)))
    labs["value"] = labs.variable.map(dict(creatinine=2.1, platelets=120.0, bilirubin_total=1.5, culture=1.0))
    start = rng.integers(-160, 200, 2 * N) / 4
    drugs = pd.DataFrame(dict(stay_id=rng.integers(0, N, 2 * N), start_h=start, end_h=start + 1, variable="antibiotic"))
    return labs, drugs.assign(rate=np.nan)


def test_suspicion_by_its_definition():
    def onset(antibiotic_h, culture_h):
        drug = frame([(1, antibiotic_h, antibiotic_h + 1, "antibiotic", 1.0)], GIVEN_COLUMNS)
        found = co.suspicions(drug, frame([(1, culture_h, culture_h, "culture", 1.0)], EVENT_COLUMNS))
        return found[["onset_h", "known_h"]].values.tolist()

    assert onset(0, 24) == [[0, 24]] and onset(0, 24.1) == []
    assert onset(72, 0) == [[0, 72]] and onset(72.1, 0) == []
    assert onset(-5, -2) == [[-5, -2]] and onset(3, 3) == [[3, 3]]


@settings(max_examples=10)
@given(seeds)
def test_suspicions_are_the_earliest_of_all_pairs(rng):
    labs, drugs = crowd(rng)
    cultures = labs[labs.variable == "culture"]
    pairs = drugs.merge(cultures, on="stay_id")
    gap = pairs.time_h - pairs.start_h
    pairs = pairs[gap.between(0, 24) | (-gap).between(0, 72)]
    want = np.minimum(pairs.start_h, pairs.time_h).groupby(pairs.stay_id).min()
    got = co.suspicions(drugs, cultures)
    pd.testing.assert_series_equal(got.groupby("stay_id").onset_h.min(), want, check_names=False)
    assert (got.onset_h == got[["antibiotic_h", "culture_h"]].min(axis=1)).all() and (got.known_h >= got.onset_h).all()


@settings(max_examples=3)
@given(seeds)
def test_sepsis_is_known_when_it_can_be_known(rng):
    labs, drugs = crowd(rng)
    septic = co.sepsis3(Frames(people(), labs, drugs)).stays
    assert len(septic) > 10 and (septic.known_h.isna() | (septic.known_h >= septic.onset_h)).all()
    assert septic.sofa_h.between(septic.onset_h - 48, septic.onset_h + 24).all() and (septic.sofa >= 2).all()
    # What is on file at known_h is enough to say so: the rest is thrown away, and the stay is found again.
    known = septic.dropna(subset="known_h").set_index("stay_id").known_h
    labs, drugs = labs[labs.available_h <= labs.stay_id.map(known)], drugs[drugs.start_h <= drugs.stay_id.map(known)]
    again = co.sepsis3(Frames(people(), labs, drugs)).stays.set_index("stay_id")
    first = septic.set_index("stay_id").loc[known.index]
    assert known.index.isin(again.index).all() and (again.onset_h[known.index] == first.onset_h).all()


@settings(max_examples=3)
@given(seeds)
def test_the_flow_adds_up(rng):
    labs, drugs = crowd(rng)
    stays = people(age_years=rng.choice([10.0, 60.0, np.nan], N), out_h=rng.uniform(1, 60, N))
    for cohort in (co.sepsis3(Frames(stays, labs, drugs)), co.all_adults(Frames(stays))):
        flow = cohort.flow
        assert flow.left.iloc[0] == N and flow.left.iloc[-1] == len(cohort) == cohort.stays.stay_id.nunique()
        assert (flow.left.shift(1, fill_value=N) - flow.excluded == flow.left).all()
        mine = stays.set_index("stay_id").loc[cohort.stays.stay_id]
        assert (mine.age_years >= 18).all() and (mine.out_h >= 4).all()
        assert cohort.stays.columns[:4].tolist() == ["stay_id", "subject_id", "onset_h", "known_h"]


def test_onset_window_and_baseline():
    rows = frame([(0, -30.0, -30.0, "culture", 1.0), (0, -28.0, -28.0, "creatinine", 4.0)], EVENT_COLUMNS)
    drugs = frame([(0, -29.0, -28.0, "antibiotic", 1.0)], GIVEN_COLUMNS)
    store = Frames(people(1), rows, drugs)
    assert len(co.sepsis3(store)) == 0
    early = co.sepsis3(store, earliest_h=-48)
    assert early.stays[["onset_h", "known_h", "sofa_h"]].values.tolist() == [[-30, 4, -28]]
    risen = [len(co.sepsis3(store, earliest_h=-48, baseline=pd.Series({0: before}))) for before in (1.0, 1.5)]
    assert risen == [1, 0]  # three points now


def test_a_store_without_cultures_or_antibiotics_says_so():
    labs, drugs = crowd(np.random.default_rng(0))
    missing = {"microbiologyevents": "no cultures: Sepsis-3 onset cannot be computed", "labevents": "no labs"}
    bare = Frames(people(), labs[labs.variable != "culture"], drugs, {"missing": missing})
    with pytest.raises(ValueError, match="needs culture and.*microbiologyevents is missing: no cultures") as e:
        co.sepsis3(bare)
    assert "labevents" not in str(e.value)
    with pytest.raises(ValueError, match="needs antibiotic and"): co.sepsis3(Frames(people(), labs))
    with pytest.raises(ValueError, match="needs ventilation and"): co.ventilation(Frames(people(), labs))


def test_ventilation_counts_hours_in_the_icu():
    tubes = [(0, -30.0, -1.0), (1, -10.0, 15.0), (2, -2.0, 24.0), (3, 40.0, 90.0), (4, 5.0, 10.0), (4, 20.0, 44.5)]
    tubes = frame([(i, a, b, "invasive_ventilation", 1.0) for i, a, b in tubes], GIVEN_COLUMNS)
    cohort = co.ventilation(Frames(people(6), [], tubes))
    assert cohort.stays[["stay_id", "onset_h", "known_h"]].values.tolist() == [[2, 0, 24], [4, 20, 44]]
    assert cohort.flow.excluded.tolist() == [0, 0, 0, 2, 2]
    assert len(co.ventilation(Frames(people(6), [], tubes), hours=10)) == 4


def test_small_counts_are_hidden_unless_the_data_are_open():
    stays = people(40, age_years=[10.0] * 7 + [60.0] * 33)
    closed, opened = co.all_adults(Frames(stays)), co.all_adults(Frames(stays, provenance={"open_data": True}))
    assert closed.shown_flow().excluded.tolist()[1:] == ["<10", "<10"]
    assert closed.shown_flow().left.tolist() == ["40", "30", "30"]
    assert opened.shown_flow().excluded.tolist()[1:] == ["7", "0"] and opened.flow.equals(closed.flow)
    words = [t.get_text() for t in closed.plot_flow().texts]
    assert "7" not in " ".join(words).split() and "33" not in " ".join(words)


def test_save_and_load(tmp_path):
    cohort = co.all_adults(Frames(people(), provenance={"open_data": True}))
    cohort.save(tmp_path / "adults")
    back = co.Cohort.load(tmp_path / "adults")
    assert (back.name, back.open_data) == (cohort.name, True)
    pd.testing.assert_frame_equal(back.stays, cohort.stays)
    pd.testing.assert_frame_equal(back.flow, cohort.flow)
    with pytest.raises(ValueError, match="not empty"): cohort.save(tmp_path / "adults")
    with pytest.raises(ValueError, match="cohort.json missing"): co.Cohort.load(tmp_path)


def test_the_demo(mimic4_demo, tmp_path):
    store = extract(mimic4_demo, tmp_path / "store", progress=False)
    assert isinstance(store, EventStore)
    adults, septic, aired = co.all_adults(store), co.sepsis3(store), co.ventilation(store)
    assert len(adults) > len(septic) > len(aired) > 20
    assert set(septic.stays.stay_id) | set(aired.stays.stay_id) <= set(adults.stays.stay_id)
    assert (septic.stays.known_h.dropna() >= septic.stays.onset_h[septic.stays.known_h.notna()]).all()
