"Decision-aligned episodes and irregular sequences: nothing from the future, nothing from another stay."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import EVENTS, INTERVENTIONS, MemoryStore, cohort, frame, futures, stores

from medsim.data.cohorts import Cohort
from medsim.data.episodes import Episodes
from medsim.data.features import MEDDREAMER_40, MEDGYM_6, SEPSIS_62, Cumulative, Derived, Last, Static, WindowSum
from medsim.data.normaliser import Normaliser
from medsim.data.rewards import RaghuReward, SofaShapedReward, VentilationReward
from medsim.data.sequences import IrregularSequences, grud_delta, observation_windows, pieces
from medsim.data.timeline import decision_grid, decision_steps, irregular, states

# every kind of feature once, under one name each
EVERYTHING = tuple({f.name: f for f in (*SEPSIS_62, *MEDDREAMER_40, *MEDGYM_6)}.values())
SMALL = (Last("lactate", flag=True), Last("map"), Static("age_years"))
moments_of_change = st.integers(0, 60).map(lambda n: n / 2) | st.floats(0.5, 30).map(lambda t: round(t, 2))


def people(n=40, n_subjects=25, seed=0):
    "Enough stays for a split, with everything that an action needs."
    rng, ids = np.random.default_rng(seed), np.arange(1, n + 1)
    stays = pd.DataFrame(dict(stay_id=ids, subject_id=100 + ids % n_subjects, age_years=rng.uniform(20, 90, n)))
    stays = stays.assign(sex="M", out_h=rng.uniform(6, 60, n), death_h=np.nan)
    stays["hospital_death"] = pd.array(rng.random(n) < 0.2, dtype="boolean")
    made = [
        (s, t, t + d, v, float(rng.uniform(low, high)), "chartevents:1")
        for s in ids
        for v, low, high, d in (("lactate", 1, 8, 1.0), ("map", 50, 90, 0), ("spo2", 90, 99, 0), ("peep", 4, 12, 0),
                                ("fio2", 25, 90, 0), ("tidal_volume_set", 350, 650, 0), ("urine", 10, 200, 0))
        for t in rng.uniform(0, 60, 12)
    ]  # fmt: skip
    given = [
        (s, t, t + rng.uniform(0.5, 9), v, float(rng.uniform(*r)), np.nan, "inputevents:1")
        for s in ids
        for v, r in (("norepinephrine", (0.02, 0.5)), ("crystalloid", (20, 400)))
        for t in rng.uniform(0, 50, 3)
    ]
    return MemoryStore(stays, frame(made, EVENTS), frame(given, INTERVENTIONS))


STORE = people()
COHORT = cohort(STORE)


@settings(max_examples=10)
@given(st.data())
def test_no_state_sees_what_comes_after_it(data):
    store, cut = data.draw(stores()), data.draw(moments_of_change)
    grid = decision_grid(observation_windows(store, cohort(store), (-24, 48)), data.draw(st.sampled_from([1.5, 4.0])))
    # decisions at any times, one of them at the very moment of the change
    grid = pd.concat([grid, grid.drop_duplicates("stay_id").assign(start_h=cut)], ignore_index=True)
    other = data.draw(futures(store, cut))
    first, again = states(store, grid, EVERYTHING)[0], states(other, grid, EVERYTHING)[0]
    before = (grid.start_h <= cut).to_numpy()
    assert first[before].tobytes() == again[before].tobytes()


@settings(max_examples=5)
@given(st.data())
def test_no_row_of_a_sequence_sees_what_comes_after_it(data):
    store, cut = data.draw(stores()), data.draw(moments_of_change)
    features = tuple(f for f in EVERYTHING if f.name != "step")
    fields = ((x,) * len(features) for x in (0.0, 0.0, 1.0, -np.inf, np.inf, False))
    how = dict(features=features, normaliser=Normaliser(tuple(f.name for f in features), *fields))
    other = data.draw(futures(store, cut))
    try:
        first, again = (irregular(s, cohort(store), **how) for s in (store, other))
    except ValueError as e:
        assert "nothing" in str(e)
        return
    for stay in (1, 2):
        parts = []
        for s in (first, again):
            i = np.flatnonzero(s.ids.stay_id == stay)
            rows = s.mask[i] & (s.time_h[i] < cut - 1 / 60)  # a row is stamped with the end of its minute
            arrays = (s.value, s.observed, s.delta, s.freshness, s.action)
            parts.append([x[i][rows].tobytes() for x in arrays])
        assert parts[0] == parts[1]


def test_the_common_fault_does_see_it():
    grid = decision_grid(observation_windows(STORE, COHORT), 4.0)
    late = STORE.all_events.assign(value=STORE.all_events.value.where(STORE.all_events.available_h < 6, 0.0))
    other = MemoryStore(STORE.stays, late, STORE.all_interventions)
    at_four = (grid.start_h == 4).to_numpy()
    for alignment, same in (("aligned", True), ("concurrent", False)):
        first, again = (states(s, grid, MEDGYM_6, alignment=alignment)[0][at_four] for s in (STORE, other))
        assert np.array_equal(first, again, equal_nan=True) == same


@given(st.floats(0.3, 30), st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 90)), min_size=1, max_size=4))
def test_the_grid_covers_each_window_once(step_h, spans):
    rows = [dict(stay_id=i, start_h=a, end_h=a + d, onset_h=0.0, known_h=0.0) for i, (a, d) in enumerate(spans)]
    grid = decision_grid(pd.DataFrame(rows), step_h)
    for row, (_, mine) in zip(rows, grid.groupby("stay_id"), strict=True):
        hours = mine.end_h - mine.start_h
        assert mine.start_h.iloc[0] == row["start_h"] and mine.end_h.iloc[-1] == row["end_h"]
        assert np.allclose(mine.start_h.iloc[1:], mine.end_h.iloc[:-1]) and (hours > 0).all()
        assert np.allclose(hours.iloc[:-1], step_h) and hours.iloc[-1] <= step_h * (1 + 1e-6)


def test_the_grid_ends_with_the_stay():
    stays = STORE.stays.head(3).assign(out_h=[100.0, 10.0, 30.0], death_h=[np.nan, np.nan, 9.0])
    store = MemoryStore(stays, STORE.all_events, STORE.all_interventions)
    three = cohort(store, onset_h=30.0)
    assert observation_windows(store, three)[["start_h", "end_h", "left"]].values.tolist() == [
        [6, 78, False], [6, 10, True], [6, 9, True]
    ]  # fmt: skip
    ventilated = Cohort("v", three.stays.assign(end_h=50.0), pd.DataFrame())
    assert observation_windows(store, ventilated).end_h.tolist() == [50, 10, 9]


def test_episodes_end_by_nature_or_by_the_clock():
    paid = decision_steps(STORE, COHORT, features=SMALL, window_h=(-24, 12))
    assert np.array_equal(paid.terminated.any(1), np.full(len(paid), True)) and not paid.truncated.any()
    assert np.allclose(paid.returns(), np.where(paid.ids.died, -15, 15))
    how = dict(features=SMALL, window_h=(-24, 12), reward=VentilationReward(), action="ventilation")
    vent = decision_steps(STORE, COHORT, **how)
    left = (STORE.stays.out_h <= 26).to_numpy()
    assert np.array_equal(vent.terminated.any(1), left) and np.array_equal(vent.truncated.any(1), ~left)
    assert vent.action_spec.n == 18 and vent.alignment["left_out"]["a ventilator setting never charted"] == 0


@pytest.mark.parametrize("step_h", [0.5, 1, 2, 4, 7.3])
def test_doses_add_up_whatever_the_step(step_h):
    features = (*SMALL, Cumulative("fluid"))
    e = decision_steps(STORE, COHORT, features=features, step_h=step_h, action="continuous", clip=None)
    given = STORE.all_interventions[STORE.all_interventions.variable == "crystalloid"]
    ends = e.ids.set_index("stay_id").end_h
    run_h = np.minimum(given.end_h, ends.reindex(given.stay_id).to_numpy()) - given.start_h
    slow = (given.rate * run_h.clip(lower=0)).groupby(given.stay_id).sum().reindex(e.ids.stay_id)
    j = e.feature_names.index("fluid")
    got = e.normaliser.only("fluid").inverse(e.final_obs[:, j : j + 1])[:, 0]
    assert np.allclose(got, slow, rtol=1e-4, atol=0.5)


def test_rewards_look_back_from_both_ends():
    rows = [(1, 1, 30, "lactate", 2, "a"), (1, 5, 30, "lactate", 4, "a")]
    rows += [(1, 1, 1, "spo2", 96, "a"), (1, 9, 9, "spo2", 96, "a")]
    stays = STORE.stays.head(1).assign(out_h=40.0)
    given = [(1, 0, 30, "norepinephrine", 0.1, np.nan, "a"), (1, 0, 30, "crystalloid", 50.0, np.nan, "a")]
    store = MemoryStore(stays, frame(rows, EVENTS), frame(given, INTERVENTIONS))
    one = dict(features=(Static("age_years"),), window_h=(-24, 2), split=(1, 0, 0))
    e = decision_steps(store, cohort(store), reward=RaghuReward(), **one)
    lactate = [0, -2 * np.tanh(2), 0]  # by the draw, though the result came at 30 h
    assert np.allclose(e.reward[0, :3], np.array(lactate) - 0.025)  # and SOFA stays at the 3 of the vasopressor
    e = decision_steps(store, cohort(store), reward=VentilationReward(), **one)
    assert np.allclose(e.reward[0, :4], [1, 0, 1, 0])  # paid in the step of the measurement, and once
    e = decision_steps(store, cohort(store), reward=SofaShapedReward(), **one)
    assert np.isfinite(e.reward).all()


def test_learned_from_training_stays_alone():
    features = (*SMALL, Last("spo2"), Cumulative("fluid"))
    base = decision_steps(STORE, COHORT, features=features)
    test = base.ids.stay_id[base.ids.fold != "train"]
    events, given = STORE.all_events, STORE.all_interventions
    other = MemoryStore(
        STORE.stays, events.assign(value=events.value.where(~events.stay_id.isin(test), 3 * events.value)),
        given.assign(rate=given.rate.where(~given.stay_id.isin(test), 3 * given.rate)),
    )  # fmt: skip
    again = decision_steps(other, COHORT, features=features)
    assert again.normaliser == base.normaliser and again.action_spec == base.action_spec
    train = (base.ids.fold == "train").to_numpy()
    assert np.array_equal(base.obs[train], again.obs[train]) and not np.array_equal(base.obs[~train], again.obs[~train])


def test_splits_share_no_subject_and_ignore_other_stays():
    e = decision_steps(STORE, COHORT, features=SMALL)
    assert (e.ids.groupby("subject_id").fold.nunique() == 1).all() and set(e.ids.fold) == {"train", "val", "test"}
    half = Cohort("half", COHORT.stays.iloc[::2].reset_index(drop=True), pd.DataFrame())
    fewer = decision_steps(STORE, half, features=SMALL).ids
    assert fewer.set_index("stay_id").fold.equals(e.ids.set_index("stay_id").fold.reindex(fewer.stay_id))


def test_normaliser_and_spec_can_be_applied_elsewhere(tmp_path):
    base = decision_steps(STORE, COHORT, features=SMALL)
    base.save(tmp_path / "episodes")
    loaded = Episodes.load(tmp_path / "episodes")
    learned = dict(normaliser=loaded.normaliser, action=loaded.action_spec)
    again = decision_steps(people(seed=1), COHORT, features=SMALL, **learned)
    assert again.normaliser == base.normaliser and again.action_spec == base.action_spec
    with pytest.raises(ValueError, match="normaliser"):
        decision_steps(STORE, COHORT, features=SMALL[:1], normaliser=base.normaliser)


def test_a_feature_that_nobody_has_is_a_constant_with_a_warning():
    with pytest.warns(UserWarning, match="never observed.*albumin"):
        e = decision_steps(STORE, COHORT, features=(*SMALL, Last("albumin", flag=True)))
    assert (e.obs[..., e.feature_names.index("albumin")] == 0).all()


def test_a_log_feature_may_fall_below_zero():
    events = STORE.all_events.assign(value=STORE.all_events.value.where(STORE.all_events.variable != "urine", -5.0))
    store = MemoryStore(STORE.stays, events, STORE.all_interventions)
    e = decision_steps(store, COHORT, features=(*SMALL, WindowSum("urine_output_4h", log=True)))
    assert np.isfinite(e.obs).all()


def test_stays_without_outcome_are_left_out_and_counted():
    unknown = STORE.stays.assign(hospital_death=STORE.stays.hospital_death.where(STORE.stays.stay_id > 3))
    store = MemoryStore(unknown, STORE.all_events, STORE.all_interventions)
    e = decision_steps(store, COHORT, features=SMALL)
    assert e.alignment["left_out"]["outcome unknown"] == 3 and e.ids.stay_id.min() == 4
    assert len(decision_steps(store, COHORT, features=SMALL, reward=VentilationReward())) == 40


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(step_h=0), "step_h=0"),
        (dict(step_h=-4), "above 0"),
        (dict(window_h=(48, -24)), "does not end after it starts"),
        (dict(features=("lactate",)), "is no feature"),
        (dict(features=()), "no features"),
        (dict(action="sedation"), "sedation"),
        (dict(fluids=("saline",)), "saline"),
        (dict(outcome="30d"), "30d"),
        (dict(outcome="90d"), "after hospital discharge"),
        (dict(alignment="off"), "aligned"),
        (dict(clock="wall"), "clock"),
        (dict(split=(0, 0, 1)), "training fold"),
        (dict(split=(0.5, 0.1)), "fractions"),
    ],
)
def test_mistakes_are_named(wrong, said):
    store = MemoryStore(STORE.stays.assign(hospital_out_h=70.0), STORE.all_events, STORE.all_interventions)
    with pytest.raises(ValueError, match=said):
        decision_steps(store, COHORT, **{"features": SMALL, **wrong})


def test_an_empty_or_strange_cohort_is_named():
    for call in (decision_steps, irregular):
        with pytest.raises(ValueError, match="has no stays"):
            call(STORE, Cohort("nobody", COHORT.stays.iloc[:0], pd.DataFrame()), features=SMALL)
        with pytest.raises(ValueError, match="not in this store"):
            others = COHORT.stays.assign(stay_id=COHORT.stays.stay_id + 999)
            call(STORE, Cohort("others", others, pd.DataFrame()), features=SMALL)


def test_delta_by_hand():
    times, seen = np.array([[0.0, 1, 3, 6]]), np.array([[[1, 0], [0, 1], [1, 0], [0, 0]]], dtype=bool)
    assert grud_delta(times, seen)[0].tolist() == [[0, 0], [1, 1], [3, 2], [3, 5]]


def test_sequences_keep_draw_and_arrival_apart():
    rows = [(1, 1.0, 1.0, "map", 70, "a"), (1, 2.0, 3.0, "lactate", 2, "a"), (1, 3.5, 3.5, "map", 60, "a")]
    store = MemoryStore(STORE.stays.head(1), frame(rows, EVENTS), frame([], INTERVENTIONS))
    s = irregular(store, cohort(store), features=SMALL, split=(1, 0, 0))
    assert s.time_h[0].tolist() == [1, 3, 3.5]
    assert np.array_equal(s.observed[0].T, [[0, 1, 0], [1, 0, 1], [1, 0, 0]])
    assert np.allclose(s.freshness[0, :, 0], [np.inf, 1, 1.5]) and np.allclose(s.freshness[0, :, 1], [0, 2, 0])
    drawn = irregular(store, cohort(store), features=SMALL, split=(1, 0, 0), clock="time")
    assert drawn.time_h[0].tolist() == [1, 2, 3.5] and drawn.freshness[0, 1, 0] == 0


def test_doses_that_led_to_a_row():
    rows = [(1, t, t, "map", 70, "a") for t in (1.0, 3.0, 3.5)]
    given = [(1, 0, 2, "norepinephrine", 0.2, np.nan, "a"), (1, 3.2, 9, "crystalloid", 100, np.nan, "a")]
    store = MemoryStore(STORE.stays.head(1), frame(rows, EVENTS), frame(given, INTERVENTIONS))
    s = irregular(store, cohort(store), features=SMALL[1:], split=(1, 0, 0))
    assert np.allclose(s.action[0], [[0.2, 0], [0.1, 0], [0, 60]]) and s.action_names == ("vasopressor", "fluid")


def test_permuting_patients_permutes_rows_only(tmp_path):
    base = irregular(STORE, COHORT, features=SMALL)
    names = dict(zip(STORE.stays.stay_id, np.random.default_rng(3).permutation(STORE.stays.stay_id), strict=True))
    tables = (STORE.stays, STORE.all_events, STORE.all_interventions)
    renamed = MemoryStore(*(t.assign(stay_id=t.stay_id.map(names)) for t in tables))
    stays = COHORT.stays.assign(stay_id=COHORT.stays.stay_id.map(names))
    again = irregular(renamed, Cohort("made up", stays, pd.DataFrame()), features=SMALL)
    order = again.ids.set_index("stay_id").index.get_indexer(base.ids.stay_id.map(names))
    back = again.select(order)
    for k, x in base.arrays().items():
        assert np.array_equal(x, getattr(back, k), equal_nan=x.dtype.kind == "f"), k
    base.save(tmp_path / "sequences")
    loaded = IrregularSequences.load(tmp_path / "sequences")
    assert loaded.ids.equals(base.ids) and loaded.normaliser == base.normaliser and loaded.alignment == base.alignment
    assert loaded.feature_names == base.feature_names and np.array_equal(loaded.filled(), base.filled())


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 6))
def test_pieces_stay_inside_a_stay_and_miss_nothing(lengths, length, stride):
    stride = min(stride, length)
    mask = np.arange(13) < np.array(lengths)[:, None]
    seen = np.zeros_like(mask)
    for stay, first in pieces(mask, length, stride):
        assert first + length <= lengths[stay] or (first == 0 and lengths[stay] < length)
        seen[stay, first : first + length] = True
    assert np.array_equal(seen & mask, mask)


def test_longest_rows_are_cut_and_counted():
    whole, cut = (irregular(STORE, COHORT, features=SMALL, max_rows=m) for m in (None, 5))
    assert cut.mask.shape[1] == 5 and cut.alignment["rows_cut"] == int(whole.mask.sum() - cut.mask.sum())
    assert np.array_equal(cut.value, whole.value[:, :5], equal_nan=True)


def test_a_step_feature_and_the_onset_reach_the_state():
    clocks = (Derived("step"), Derived("hours_since_onset"), Derived("hours_in_icu"))
    e = decision_steps(STORE, COHORT, features=clocks, clip=None)
    step, since, hour = (e.physical(n)[e.mask] for n in e.feature_names)
    late = hour > 20.5  # the onset of 14 h is known at 20 h: after the decision of 20 h
    assert np.allclose(hour, 4 * step, atol=1e-3) and np.allclose(since[~late], 0, atol=1e-3)
    assert np.allclose(since[late], hour[late] - 14, atol=1e-3)
