"SOFA and its parts: the numbers of the table, brute-force checks of the sweeps, and what the clocks promise."
import numpy as np
import pandas as pd
import pytest
from crowd import EVENT_COLUMNS, GIVEN, GIVEN_COLUMNS, RANGES, Frames, crowd_events, crowd_given, crowd_stays, frame
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.data import scores as sc

STAYS = pd.DataFrame(dict(stay_id=[3, 8], subject_id=[1, 2], age_years=[60.0, 70.0], out_h=[40.0, 30.5]))

quarter = st.integers(-40, 160).map(lambda k: k / 4)  # quarters of an hour, so that ties happen
delay = st.integers(0, 24).map(lambda k: k / 4)
stay = st.sampled_from([3, 8])
@st.composite
def event(draw, names):
    name, t = draw(st.sampled_from(names)), draw(quarter)
    return draw(stay), t, t + draw(delay), name, float(draw(st.integers(*RANGES[name])))


@st.composite
def infusion(draw):
    start = draw(quarter)
    end, rate = start + draw(st.integers(1, 80)) / 4, draw(st.sampled_from([0.04, 0.1, 0.2, 4.0, 6.0, 20.0]))
    return draw(stay), start, end, draw(st.sampled_from(GIVEN)), rate


def test_published_numbers():
    assert np.isclose(sc.nee(vasopressin=2.4), 0.1)
    assert np.isclose(sc.nee(norepinephrine=0.2, epinephrine=0.2), 0.4)
    assert np.isclose(sc.nee(phenylephrine=1.0), 0.1) and np.isclose(sc.nee(dopamine=10.0), 0.1)
    gas = frame([(3, 1.0, 1.0, "fio2", 60.0), (3, 2.0, 2.5, "pao2", 80.0)], EVENT_COLUMNS)
    assert np.isclose(sc.pf_ratio(gas).value.item(), 133.33, atol=0.01)
    awake = [(3, 1.0, 1.0, f"gcs_{part}", v) for part, v in (("eye", 4.0), ("verbal", 5.0), ("motor", 6.0))]
    assert sc.gcs_total(frame(awake, EVENT_COLUMNS)).value.tolist() == [15]


def test_every_threshold_of_the_table():
    assert sc.coagulation([150, 149.9, 100, 99, 50, 49, 20, 19]).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert sc.liver([1.1, 1.2, 1.9, 2, 5.9, 6, 11.9, 12]).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert sc.cns([15, 14, 13, 12, 10, 9, 6, 5]).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert sc.respiration([400, 399, 300, 299, 200, 199, 100, 99], True).tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert sc.respiration([199, 99], False).tolist() == [2, 2]
    assert sc.renal([1.1, 1.2, 2, 3.5, 5]).tolist() == [0, 1, 2, 3, 4]
    assert sc.renal(np.nan, [500, 499, 200, 199]).tolist() == [0, 3, 3, 4]
    assert sc.cardiovascular(80, dopamine=[0, 5, 5.1, 15, 15.1]).tolist() == [0, 2, 3, 3, 4]
    assert sc.cardiovascular(60, dobutamine=0.5) == 2 and sc.cardiovascular(60) == 1


@settings(max_examples=30)
@given(st.lists(st.tuples(stay, quarter, delay, st.integers(0, 4)), max_size=20), st.sampled_from(sc._CLOCKS))
def test_worst_is_the_maximum_over_the_window(rows, clock):
    scored = frame(rows, ["stay_id", "time_h", "late", "score"])
    scored["available_h"] = scored.time_h + scored.late
    grid = sc.HourGrid.of(STAYS, start_h=-12)
    got = grid.worst(scored.stay_id, *sc.window_span(scored, clock=clock, window_h=24), scored.score)
    hours, r = grid.frame().to_numpy()[:, :, None], {c: scored[c].to_numpy()[None] for c in scored}
    seen = r["time_h"] <= hours[:, 1] if clock == "time" else r["available_h"] < hours[:, 1]
    inside = (r["stay_id"] == hours[:, 0]) & (r["time_h"] > hours[:, 1] - 24) & seen
    want = np.where(inside, r["score"], -1).max(axis=1, initial=-1)
    assert np.array_equal(np.nan_to_num(got, nan=-1), want)


@settings(max_examples=30)
@given(st.lists(infusion(), min_size=1, max_size=8))
def test_running_total_is_the_sum_of_what_runs(rows):
    given_rows = frame(rows, GIVEN_COLUMNS)
    total = sc.running_total(given_rows)
    t = np.arange(-20, 100, 0.25) + 0.1
    for keys, group in given_rows.groupby(["stay_id", "variable"]):
        mine = total[(total.stay_id == keys[0]) & (total.variable == keys[1])]
        rates = [
            (((g.start_h.to_numpy() <= t[:, None]) & (t[:, None] < g.end_h.to_numpy())) * g.rate.to_numpy()).sum(axis=1)
            for g in (group, mine)
        ]
        assert np.allclose(*rates, atol=1e-4)
        assert (mine.start_h.to_numpy()[1:] >= mine.end_h.to_numpy()[:-1]).all()


@settings(max_examples=30)
@given(st.lists(event(names=("pao2", "fio2")), max_size=25))
def test_pf_ratio_takes_the_last_fio2_on_file(rows):
    want = []
    for who, t, known, _, value in (r for r in rows if r[3] == "pao2"):
        near = [r for r in rows if r[3] == "fio2" and r[0] == who and t - 4 <= r[1] <= t and r[2] <= known]
        if near: want.append((who, t, known, 100 * value / max(near, key=lambda r: (r[1], r[2], r[4]))[4]))
    got = sc.pf_ratio(frame(rows, EVENT_COLUMNS))
    assert len(got) == len(want) and np.allclose(sorted(got.itertuples(index=False, name=None)), sorted(want))


# One call of `sofa` costs as much for two stays as for a hundred: the properties below are held by a crowd a time.


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
N = 100
WORSE = dict(platelets=5, bilirubin_total=15, map=30, creatinine=6, pao2=40, gcs_total=3, norepinephrine=0.5)


@settings(max_examples=3)
@given(seeds, st.sampled_from(sc._CLOCKS))
def test_a_worse_value_never_lowers_the_score(rng, clock):
    stays, rows, drugs = crowd_stays(rng, N), crowd_events(rng, N, 30 * N), crowd_given(rng, N, 3 * N)
    rows = rows[~rows.variable.isin(["gcs_eye", "gcs_verbal", "gcs_motor", "gcs_untestable"])]
    added = pd.DataFrame(dict(stay_id=range(N), time_h=rng.integers(-40, 160, N) / 4))
    added["variable"] = rng.choice(list(WORSE), N)
    added["value"] = added.variable.map(WORSE).astype(float)
    drip = added[added.variable == "norepinephrine"].rename(columns={"time_h": "start_h", "value": "rate"})
    more = pd.concat([rows, added[added.variable != "norepinephrine"].assign(available_h=added.time_h)])
    before = sc.sofa(Frames(stays, rows, drugs), clock=clock)
    after = sc.sofa(Frames(stays, more, pd.concat([drugs, drip.assign(end_h=drip.start_h + 1)])), clock=clock)
    for column in ("sofa", "organs_observed", *sc.ORGANS):
        assert (after[column].fillna(0) >= before[column].fillna(0)).all(), column
    assert (after.sofa > before.sofa).any()


OPTIONS = [{}, dict(untestable_gcs="as_charted"), dict(count_all_pressors=True, support="invasive")]


@settings(max_examples=5)
@given(seeds, st.integers(1, 40), st.sampled_from(OPTIONS))
def test_the_available_clock_cannot_see_the_future(rng, t, options):
    stays, rows, drugs = crowd_stays(rng, N), crowd_events(rng, N, 40 * N), crowd_given(rng, N, 4 * N)
    other = pd.concat([rows[rows.available_h < t], crowd_events(rng, N, 20 * N, after=t)])
    begun = drugs[drugs.start_h < t]
    ended = begun.end_h.where(begun.end_h < t, t + rng.integers(0, 40, len(begun)) / 4)
    changed = pd.concat([begun.assign(end_h=ended), crowd_given(rng, N, 2 * N, after=t)])
    one, two = Frames(stays, rows, drugs), Frames(stays, other, changed)
    a, b = (sc.sofa(store, clock="available", start_h=-12, **options) for store in (one, two))
    pd.testing.assert_frame_equal(a[a.time_h <= t], b[b.time_h <= t])
    assert not a.equals(b)


@settings(max_examples=2)
@given(seeds)
def test_range_and_missing_organs(rng):
    stays = crowd_stays(rng, N)
    got = sc.sofa(Frames(stays, crowd_events(rng, N, 8 * N), crowd_given(rng, N, N)))
    organs = got[[*sc.ORGANS]]
    assert got.groupby("stay_id").size().tolist() == np.ceil(stays.out_h).astype(int).tolist() and got.time_h.min() == 1
    assert (organs.isna() | organs.isin([0, 1, 2, 3, 4])).all(axis=None)
    assert (got.organs_observed == organs.notna().sum(axis=1)).all()
    assert (got.sofa.isna() == (got.organs_observed == 0)).all()
    assert (got.sofa.fillna(0) == organs.fillna(0).sum(axis=1)).all()


@settings(max_examples=2)
@given(seeds)
def test_one_stay_alone_scores_as_it_does_in_a_crowd(rng):
    store = Frames(crowd_stays(rng, N), crowd_events(rng, N, 20 * N), crowd_given(rng, N, 2 * N))
    crowd, few = sc.sofa(store), sc.sofa(store, stay_ids=[7, 8])
    pd.testing.assert_frame_equal(crowd[crowd.stay_id.isin([7, 8])].reset_index(drop=True), few)


def test_gcs_conventions():
    parts = [(3, 5.0, 5.0, "gcs_eye", 1.0), (3, 5.0, 5.0, "gcs_verbal", 1.0), (3, 5.0, 5.0, "gcs_motor", 4.0)]
    tube = [(3, 2.0, 2.0, "vent_setting", 1.0), (3, 6.0, 6.0, "vent_setting", 1.0)]
    at_six = lambda rows, **o: sc.sofa(Frames(STAYS, rows), **o).query("stay_id == 3 and time_h == 6").cns.item()  # noqa: E731
    assert at_six(parts) == 3  # nobody says there is a tube: 1 + 1 + 4
    assert at_six(parts + tube) == 0
    assert at_six([*parts, (3, 5.0, 5.0, "gcs_untestable", 1.0)]) == 0
    assert at_six(parts + tube, untestable_gcs="as_charted") == 3
    both = frame([*parts, (3, 5.0, 5.0, "gcs_total", 7.0)], EVENT_COLUMNS)
    assert sc.gcs_total(both, untestable="as_charted").value.tolist() == [7]


def test_all_pressors_on_request():
    drugs = [(3, 1.0, 2.0, "phenylephrine", 2.0)]
    pressure = [(3, 1.0, 1.0, "map", 80.0)]
    store = Frames(STAYS, pressure, drugs)
    assert sc.sofa(store).cardiovascular.iloc[0] == 0
    assert sc.sofa(store, count_all_pressors=True).cardiovascular.iloc[0] == 4


def test_options_are_checked_and_no_rows_is_no_error():
    empty = Frames(STAYS)
    assert sc.sofa(empty).sofa.isna().all()
    assert sc.sofa(empty, stay_ids=[]).empty and len(sc.sofa(empty, stay_ids=[8], start_h=-2)) == 33
    for wrong in (dict(clock="wall"), dict(untestable_gcs="guess"), dict(support="oxygen")):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))): sc.sofa(empty, **wrong)


def test_sirs_and_shock_index():
    assert sc.sirs(39, 95, 25, 40, 13) == 4 and sc.sirs(35.9) == 1 and sc.sirs(bands=11) == 1
    assert sc.sirs(38, 90, 20, 32, 12, 10) == 0 and np.isnan(sc.sirs())
    assert np.isclose(sc.shock_index(90, 100), 0.9) and np.isnan(sc.shock_index(90, 0))
