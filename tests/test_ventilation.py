"Ventilation episodes: settings, procedures, their union, and what was known when."

import numpy as np
import pandas as pd
import pytest
from crowd import EVENT_COLUMNS, GIVEN_COLUMNS, Frames, crowd_events, crowd_given, crowd_stays, frame
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.data import ventilation as ve

N = 60
AIR = ve.VENTILATION_EVENTS
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def air(*rows):
    return frame([(1, t, t, variable, 1.0) for t, variable in rows], EVENT_COLUMNS)


def crowd(rng, after=-10.0, size=20 * N):
    rows = crowd_events(rng, N, size, after)
    given_rows = crowd_given(rng, N, size // 5, after)
    return rows.assign(variable=rng.choice(AIR, len(rows)), value=1.0), given_rows


def test_settings_join_over_a_gap_and_end_with_the_tube():
    hours = [(t, "vent_setting") for t in (0, 8, 16.5)]
    assert ve.setting_runs(air(*hours)).values.tolist() == [[1, 0, 8]]  # 8 h join, 8.5 h do not, one alone is dropped
    assert ve.setting_runs(air(*hours), gap_h=9).values.tolist() == [[1, 0, 16.5]]
    for off in ("extubation", "oxygen_device", "noninvasive_setting"):
        assert ve.setting_runs(air((0, "vent_setting"), (2, off), (3, "vent_setting"))).values.tolist() == [[1, 0, 2]]
    same = air((0, "vent_setting"), (2, "oxygen_device"), (2, "vent_setting"), (3, "vent_setting"), (3, "extubation"))
    assert ve.setting_runs(same).values.tolist() == [[1, 0, 2], [1, 2, 3]]
    assert ve.setting_runs(air()).empty


def test_a_charted_zero_is_no_evidence():
    zero = air((0, "vent_setting"), (2, "vent_setting")).assign(value=0.0)
    assert ve.setting_runs(zero).empty


@settings(max_examples=5)
@given(seeds, st.sampled_from([0.0, 1.0]))
def test_union_covers_what_its_parts_cover(rng, join_h):
    parts = crowd_given(rng, 5, 60).assign(source=rng.choice(["procedure", "settings"], 60))
    whole = ve.union(parts, join_h=join_h)
    t = np.arange(-20, 100, 0.25) + 0.125

    def covered(intervals, stay_id):
        i = intervals[intervals.stay_id == stay_id]
        return ((i.start_h.to_numpy() <= t[:, None]) & (t[:, None] < i.end_h.to_numpy())).any(axis=1)

    for stay_id in range(5):
        inside, of_parts = covered(whole, stay_id), covered(parts, stay_id)
        assert (inside >= of_parts).all() and (join_h > 0 or (inside == of_parts).all())
        mine = whole[whole.stay_id == stay_id]
        assert (mine.start_h.to_numpy()[1:] > mine.end_h.to_numpy()[:-1] + join_h).all()


@settings(max_examples=5)
@given(seeds, st.integers(1, 40), st.sampled_from(["invasive", "any"]))
def test_the_bedside_cannot_see_the_future(rng, t, kind):
    rows, begun = crowd(rng)
    later, more = crowd(rng, after=t)
    other = pd.concat([rows[rows.available_h < t], later])
    begun_before = begun[begun.start_h < t]
    ended = begun_before.end_h.where(begun_before.end_h < t, t + rng.integers(0, 40, len(begun_before)) / 4)
    changed = pd.concat([begun_before.assign(end_h=ended), more])
    stays = crowd_stays(rng, N)
    q = pd.DataFrame([(i, h) for i in range(N) for h in np.arange(-5, t + 0.25, 0.75)], columns=["stay_id", "time_h"])
    q = q[q.time_h <= t].sample(frac=1, random_state=0)  # any order
    before, after = (ve.ventilated_at(Frames(stays, *s), q, kind=kind) for s in ((rows, begun), (other, changed)))
    assert (before == after).all() and 0 < before.mean() < 1


@settings(max_examples=5)
@given(seeds, st.sampled_from(["invasive", "any"]))
def test_hindsight_is_the_intervals(rng, kind):
    store = Frames(crowd_stays(rng, N), *crowd(rng))
    spans = ve.ventilation_intervals(store, kind=kind)
    assert spans.source.isin(["procedure", "settings", "both"]).all() and (spans.end_h > spans.start_h).all()
    q = pd.DataFrame(dict(stay_id=rng.integers(0, N, 300), time_h=rng.uniform(-10, 60, 300)))
    found = ve.ventilated_at(store, q, clock="time", kind=kind)
    inside = q.reset_index().merge(spans, on="stay_id").query("start_h <= time_h <= end_h")["index"]
    assert (found == q.index.isin(inside)).all()


def test_reports_count_from_when_they_were_available():
    late = frame([(1, 2.0, 5.0, "vent_setting", 1.0)], EVENT_COLUMNS)
    store = Frames(crowd_stays(np.random.default_rng(0), 2), late)
    q = pd.DataFrame(dict(stay_id=1, time_h=[2.0, 5.0, 5.1, 10.0, 10.1]))
    assert ve.ventilated_at(store, q).tolist() == [False, False, True, True, False]


def test_a_procedure_end_is_a_report():
    store = Frames(
        crowd_stays(np.random.default_rng(0), 2),
        air((1, "vent_setting"), (3, "vent_setting")),
        frame([(1, 0.5, 4.0, "invasive_ventilation", 1.0)], GIVEN_COLUMNS),
    )
    q = pd.DataFrame(dict(stay_id=[1, 1, 1, 0], time_h=[0.5, 4.0, 4.1, 1.0]))
    assert ve.ventilated_at(store, q).tolist() == [False, True, False, False]
    assert ve.ventilation_intervals(store).values.tolist() == [[1, 0.5, 4.0, "both"]]


def test_choices_are_checked_and_an_empty_store_is_no_error():
    empty = Frames(crowd_stays(np.random.default_rng(0), 3))
    q = pd.DataFrame(dict(stay_id=[0, 2], time_h=[1.0, 2.0]))
    assert ve.ventilation_intervals(empty).empty
    for clock in ("available", "time"):
        assert not ve.ventilated_at(empty, q, clock=clock).any()
        assert len(ve.ventilated_at(empty, q[:0], clock=clock)) == 0
    with pytest.raises(ValueError, match="clock='wall'"): ve.ventilated_at(empty, q, clock="wall")
    with pytest.raises(ValueError, match="kind='mask'"): ve.ventilation_intervals(empty, kind="mask")
