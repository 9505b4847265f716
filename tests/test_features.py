"What was known at a moment, and the features made of it."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import EVENTS, INTERVENTIONS, MemoryStore, event_rows, frame, stores

from medsim.data.features import (
    MEDDREAMER_40,
    MEDGYM_6,
    SEPSIS_62,
    Cumulative,
    Derived,
    Last,
    Static,
    WindowSum,
    check_features,
    columns,
    feature_from_dict,
    feature_to_dict,
    log_where_skewed,
    state,
    with_flags,
)
from medsim.data.known import Known, carry_short_gaps, urine_rate
from medsim.data.windows import (
    amount_until,
    last_known,
    trailing_sum,
    window_amount,
    window_mean_rate,
    window_mean_value,
)

few = settings(max_examples=20)


def spans(n, stays=3):
    "Up to n intervals (stay_id, start_h, end_h, rate), some of no length, many touching."
    row = st.tuples(st.integers(1, stays), st.integers(-4, 40), st.integers(0, 30), st.floats(0, 5))
    columns = ["stay_id", "start_h", "end_h", "rate"]
    rows = st.lists(row, max_size=n)
    return rows.map(lambda rows: frame([(s, a / 2, (a + d) / 2, r) for s, a, d, r in rows], columns))


moments_of = st.lists(st.tuples(st.integers(1, 3), st.integers(-4, 80)), min_size=1, max_size=10).map(
    lambda rows: frame([(s, t / 2) for s, t in rows], ["stay_id", "at_h"])
)


@few
@given(spans(12), spans(12))
def test_window_sums_equal_the_definition(intervals, windows):
    slow = np.zeros(len(windows))
    for w, (stay, a, b, _) in enumerate(windows.to_numpy()):
        for other, s, e, rate in intervals.to_numpy():
            if stay == other: slow[w] += rate * max(0.0, min(e, b) - max(s, a))
    assert np.allclose(window_amount(intervals, windows), slow)
    some = windows.end_h > windows.start_h
    mean = window_mean_rate(intervals, windows[some])
    assert np.allclose(mean * (windows.end_h - windows.start_h)[some], slow[some])
    assert np.array_equal(window_amount(intervals.iloc[::-1], windows), window_amount(intervals, windows))
    assert np.array_equal(window_amount(intervals, windows.iloc[::-1])[::-1], window_amount(intervals, windows))


@few
@given(spans(10), moments_of)
def test_amount_until_is_the_window_from_admission(intervals, moments):
    windows = moments.assign(start_h=0.0, end_h=moments.at_h)
    assert np.allclose(amount_until(intervals, moments), window_amount(intervals, windows))


def test_doses_by_hand():
    bag = frame([(1, 0, 7.5, 200)], ["stay_id", "start_h", "end_h", "rate"])
    steps = frame([(1, 0, 4), (1, 4, 8)], ["stay_id", "start_h", "end_h"])
    assert np.allclose(window_amount(bag, steps), [800, 700])
    half_hour = frame([(1, 1, 1.5, 0.2)], ["stay_id", "start_h", "end_h", "rate"])
    assert np.allclose(window_mean_rate(half_hour, steps), [0.025, 0])
    sliver = frame([(1, 0, 4 + 1e-12, 0.2)], ["stay_id", "start_h", "end_h", "rate"])
    assert window_mean_rate(sliver, steps)[1] == 0  # a rounding error is no dose


@few
@given(st.lists(event_rows([1, 2]), max_size=20), moments_of)
def test_last_known_equals_the_definition(rows, moments):
    records = frame(rows, EVENTS).assign(variable="x")
    for clock, column in (("available", "available_h"), ("time", "time_h")):
        found = last_known(records, moments, clock=clock, hold_h=10)
        for (stay, t), got in zip(moments.to_numpy(), found.to_numpy(), strict=True):
            known = records[(records.stay_id == stay) & (records[column] < t)]
            newest = known.time_h.max()
            if np.isnan(newest) or t - newest > 10:
                assert np.isnan(got[0]) and got[2] == -1
            else:
                assert got[1] == newest and got[0] in known.value[known.time_h == newest].to_numpy()


def test_a_late_result_of_an_older_draw_never_replaces_a_newer():
    rows = [(1, 5, 5.5, "lactate", 2, "a"), (1, 7, 8, "lactate", 4, "a"), (1, 6, 9, "lactate", 9, "a")]
    found = last_known(frame(rows, EVENTS), frame([(1, t) for t in (5.5, 5.6, 8, 8.1, 9.1)], ["stay_id", "at_h"]))
    assert np.array_equal(found.value, [np.nan, 2, 2, 4, 4], equal_nan=True)


def test_of_two_sources_at_once_the_first_item_counts_in_any_order():
    rows = [(1, 5, 5, "map", 90, "chartevents:220181"), (1, 5, 5, "map", 70, "chartevents:220052")]
    at = frame([(1, 6)], ["stay_id", "at_h"])
    for order in (rows, rows[::-1]):
        assert last_known(frame(order, EVENTS), at).value.tolist() == [70]


@few
@given(st.lists(event_rows([1, 2]), max_size=20), moments_of, st.sampled_from([1.0, 4.0]))
def test_trailing_sum_equals_the_definition(rows, moments, span):
    r = frame(rows, EVENTS)
    slow = []
    for stay, t in moments.to_numpy():
        known = r[(r.stay_id == stay) & (r.time_h >= t - span) & (r.time_h < t) & (r.available_h < t)]
        slow.append(known.value.sum() if len(known) else np.nan)
    assert np.allclose(trailing_sum(r, moments, span), slow, equal_nan=True)


def test_a_setting_holds_until_the_next_or_its_limit():
    fio2 = frame([(1, -1, -1, "fio2", 60, "a"), (1, 1, 1, "fio2", 40, "a")], EVENTS)
    steps = frame([(1, 0, 4), (1, 4, 8)], ["stay_id", "start_h", "end_h"])
    assert np.allclose(window_mean_value(fio2, steps), [45, 40])
    assert np.allclose(window_mean_value(fio2, steps, hold_h=2), [140 / 3, np.nan], equal_nan=True)


@few
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(0, 500)), max_size=25))
def test_urine_rates_neither_lose_nor_invent_volume(rows):
    times = frame([(s, t / 5, t / 5, "urine", v, "a") for s, t, v in rows], EVENTS)
    rates = urine_rate(times)
    for stay, mine in rates.groupby("stay_id"):
        gaps = mine.time_h.diff().fillna(mine.time_h)
        last = mine.time_h.max()  # what follows waits for a later charting
        charted = times.value[(times.stay_id == stay) & (times.time_h <= last)].sum()
        assert (gaps >= 0.5 - 1e-9).all() and np.isclose((mine.value * gaps).sum() / 24, charted)


def test_irrigation_is_no_negative_urine():
    rates = urine_rate(frame([(1, 2, 2, "urine", 100, "a"), (1, 4, 4, "urine", -60, "a")], EVENTS))
    assert rates.value.tolist() == [1200, 0]


def test_short_gaps_are_carried_within_a_stay_only():
    gap, volume = carry_short_gaps(np.array([0.2, 0.6, 0.1]), np.array([5.0, 10, 7]), np.array([True, False, True]))
    assert np.allclose(gap, [0.2, 0.8, 0.1]) and np.allclose(volume, [5, 15, 7])


def test_published_sets():
    assert len(SEPSIS_62) == 37 and sum(f.flag for f in SEPSIS_62) == 25
    assert columns(SEPSIS_62) == sorted(columns(SEPSIS_62)) and len(columns(SEPSIS_62)) == 62
    assert len(columns(MEDDREAMER_40)) == 40 and [f.name for f in MEDGYM_6][-1] == "lactate"
    for f in (*SEPSIS_62, *MEDDREAMER_40, *MEDGYM_6):
        assert feature_from_dict(feature_to_dict(f)) == f and f.unit


def store_of(rows, given=(), **stay):
    stays = pd.DataFrame([dict(stay_id=1, subject_id=1, age_years=60.0, sex="F", out_h=50.0, **stay)])
    return MemoryStore(stays, frame(rows, EVENTS), frame(list(given), INTERVENTIONS))


def asked(store, features, *at, **known):
    moments = pd.DataFrame(dict(stay_id=1, at_h=[float(t) for t in at], onset_h=3.0, known_h=6.0, step=range(len(at))))
    return state(Known(store, moments, **known), features)


def test_a_value_lapses_and_its_flag_says_so():
    store = store_of([(1, 0.5, 0.5, "heart_rate", 80, "a")])  # holds 8 h
    features = (Last("heart_rate", flag=True),)
    got = with_flags(asked(store, features, 0.5, 1, 8.5, 8.6), features)
    assert np.array_equal(got, [[np.nan, 1], [80, 0], [80, 0], [np.nan, 1]], equal_nan=True)


def test_pf_ratio_by_hand():
    rows = [(1, 1, 1, "fio2", 60, "a"), (1, 2, 2.1, "pao2", 80, "a"), (1, 3, 3, "fio2", 40, "a")]
    assert np.allclose(asked(store_of(rows), (Last("pf_ratio"),), 4), 80 / 0.6)  # paired with the FiO2 of its draw


def test_running_infusions_count_as_far_as_they_have_run():
    given = [(1, 0, 7.5, "crystalloid", 200, 1500, "a"), (1, 2, 6, "norepinephrine", 0.2, np.nan, "a")]
    features = (Cumulative("fluid"), Cumulative("pressor", "vasopressor"))
    assert np.allclose(asked(store_of([], given), features, 0, 4, 20), [[0, 0], [800, 24], [1500, 48]])


def test_the_onset_counts_from_when_it_was_known():
    assert asked(store_of([]), (Derived("hours_since_onset"),), 4, 6, 6.5).ravel().tolist() == [0, 0, 3.5]


def test_static_and_unknown_sex():
    store = store_of([], readmission=None)
    store.stays["readmission"] = pd.array([None], dtype="boolean")
    got = asked(store, (Static("age_years"), Static("female"), Static("readmission")), 1)
    assert np.array_equal(got, [[60, 1, np.nan]], equal_nan=True)
    store.stays["sex"] = pd.array([None], dtype="string")
    assert np.isnan(asked(store, (Static("female"),), 1)).all()


def test_log_where_skewed():
    features = (Last("lactate"), Last("heart_rate"), WindowSum("urine_output_4h"), Static("age_years"))
    assert [f.log for f in log_where_skewed(features)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Last("lactat"), "did you mean lactate"),
        (lambda: Derived("shock"), "no formula 'shock'"),
        (lambda: Static("hospital_death"), "not known at admission"),
        (lambda: Cumulative("x", "saline"), "neither"),
        (lambda: WindowSum("x", "urine", 0), "above 0"),
        (lambda: check_features(()), "no features"),
        (lambda: check_features(("lactate",)), "is no feature"),
        (lambda: check_features((Last("map"), Last("map"))), "two columns"),
        (lambda: feature_from_dict({"kind": "Last", "name": "map", "lag": 1}), "no lag"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@settings(max_examples=8)
@given(stores(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_stays_does_not_matter(store, random):
    moments = pd.DataFrame(dict(stay_id=np.repeat([1, 2], 4), at_h=[0.0, 4, 9.5, 30] * 2))
    moments = moments.assign(onset_h=3.0, known_h=6.0, step=0)
    events = store.all_events.drop_duplicates(["stay_id", "time_h", "available_h", "variable", "item"])
    shuffled = events.sample(frac=1, random_state=random.randint(0, 99))
    a = MemoryStore(store.stays, events, store.all_interventions)
    b = MemoryStore(store.stays.iloc[::-1], shuffled, store.all_interventions.iloc[::-1])
    order = random.sample(range(8), 8)
    features = (*SEPSIS_62, Derived("sofa"), Derived("mechanical_ventilation"), Last("urine_rate"))
    first = state(Known(a, moments), features)
    again = state(Known(b, moments.iloc[order].reset_index(drop=True)), features)
    assert np.array_equal(first[order], again, equal_nan=True)
