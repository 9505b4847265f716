"Tasks from records: rows, doses, rewards and ends on real stores, and that no row knows what comes after it."

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import EVENTS, INTERVENTIONS, MemoryStore, cohort, frame
from test_causality import disturbed

from medsim.core.scale import scale
from medsim.data.actions import SepsisGrid
from medsim.data.cohorts import Cohort, ventilation
from medsim.data.features import MEDDREAMER_40, Last
from medsim.data.rewards import RaghuReward, VentilationReward
from medsim.data.sequences import irregular
from medsim.data.store import EventStore
from medsim.data.treatments import mean_rate
from medsim.world.charts import Windows
from medsim.world.learning import Descent, train_world
from medsim.world.tasks import (
    TaskCharts,
    charts_of,
    peak_rate,
    rested,
    sepsis_task,
    settings_in_force,
    settings_known_h,
    staircase,
    ventilation_task,
)
from medsim.world.world_model import small

STORES = ["mimic4_store", "mimic3_store", "eicu_store", "sample_store"]
MADE: dict[tuple[str, str], TaskCharts] = {}


def made(request: pytest.FixtureRequest, source: str, task: str) -> TaskCharts:
    "The charts of a task on a store, once a session."
    if (source, task) not in MADE:
        store = request.getfixturevalue(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            MADE[source, task] = sepsis_task(store) if task == "sepsis" else ventilation_task(store)
    return MADE[source, task]


# ---- on real stores


@pytest.mark.parametrize("task", ["sepsis", "ventilation"])
@pytest.mark.parametrize("source", STORES)
def test_charts_of_real_stores_hold_together(source, task, request):
    store, c = request.getfixturevalue(source), made(request, source, task)
    n, length = c.mask.shape
    d = len(c.feature_names)
    for x in (c.value, c.observed, c.delta, c.freshness): assert x.shape == (n, length, d)
    for x in (c.action, c.hours, c.reward, c.ended, c.time_h): assert x.shape == (n, length)
    assert np.isfinite(c.value).all() and np.isfinite(c.reward).all() and np.isfinite(c.delta).all()
    assert c.mask[:, 0].all() and (c.mask[:, 1:] <= c.mask[:, :-1]).all() and len(c.ids) == n

    assert (c.action[:, 0] == -1).all() and (c.action[:, 1:][c.mask[:, 1:]] >= 0).all()
    assert (c.action < (25 if task == "sepsis" else 18)).all() and (c.action[~c.mask] == -1).all()

    assert (c.ids.groupby("subject_id").fold.nunique() == 1).all() and c.fold("train").any()
    last = c.mask & ~np.pad(c.mask[:, 1:], ((0, 0), (0, 1)))
    stays = store.stays.set_index("stay_id").reindex(c.ids.stay_id)
    gone = np.fmin(stays.out_h, stays.death_h).to_numpy()
    assert not (c.ended & ~last).any()
    np.testing.assert_allclose(c.time_h[c.ended], gone[c.ended.any(1)])
    cut = c.ids[~c.ended.any(1)]
    assert (cut.end_h < gone[~c.ended.any(1)]).all()  # the others were cut while the patient was there

    gap = c.hours[:, 1:][c.mask[:, 1:] & ~c.ended[:, 1:]]
    assert (gap > 1 - 1e-4).all() and (c.hours[:, 1:][c.mask[:, 1:]] > 0).all() and (c.hours[:, 0] == 0).all()
    own = c.freshness[c.observed]
    assert (c.reward[:, 0] == 0).all() and np.isfinite(own).all() and not np.isnan(c.freshness).any()


@pytest.mark.parametrize("source", STORES)
def test_all_forty_features_but_those_that_are_not_there(source, request):
    absent = {"eicu_store": {"total_co2", "pt"}, "sample_store": {"elixhauser", "total_co2"}}.get(source, set())
    for task in ("sepsis", "ventilation"):
        c = made(request, source, task)
        assert {f.name for f in MEDDREAMER_40} - set(c.feature_names) == absent == set(c.about["features_left_out"])
    assert made(request, source, "sepsis").about["outcome"] == ("hospital" if source == "eicu_store" else "90d")


def test_edges_come_from_training_stays_alone(request, mimic4_store, tmp_path):
    c, store = made(request, "mimic4_store", "sepsis"), mimic4_store
    elsewhere = c.ids.stay_id[~c.fold("train")]
    doses = store.interventions().astype({"variable": str, "item": str})
    of_others = doses.stay_id.isin(elsewhere)
    doses.loc[of_others, ["rate", "amount"]] *= 3
    other = EventStore.write(tmp_path / "store", store.stays, store.events(), doses, store.provenance)
    again = sepsis_task(other, cohort=members(c), normaliser=c.normaliser)
    assert again.action_spec == c.action_spec
    train = c.fold("train")
    np.testing.assert_array_equal(again.action[train], c.action[train])


def members(c: TaskCharts, **columns) -> Cohort:
    "The cohort of those in the charts."
    stays = c.ids[["stay_id", "subject_id", "onset_h", "known_h"]].assign(**columns)
    return Cohort("members", stays, pd.DataFrame(), open_data=True)


# ---- nothing ahead


SEEN = ("time_h", "value", "observed", "delta", "freshness", "hours", "reward")


def rows_until(c: TaskCharts, hour: np.ndarray, fields=SEEN) -> list[np.ndarray]:
    "What is in rows up to an hour of each stay."
    upto = c.mask & (c.time_h <= hour[:, None])
    return [getattr(c, f)[upto] for f in fields]


@pytest.mark.parametrize("source", ["mimic4_store", "eicu_store"])
def test_rows_ignore_the_future(source, request, tmp_path):
    c, store = made(request, source, "sepsis"), request.getfixturevalue(source)
    k = np.random.default_rng(5).integers(0, c.mask.sum(1))  # a row of every stay; what comes after it is changed
    hour = c.time_h[np.arange(len(k)), k]
    ended = c.ended[np.arange(len(k)), k]
    other = disturbed(store, pd.Series(hour + 1e-6, c.ids.stay_id), 3, tmp_path / "store")
    again = sepsis_task(other, cohort=members(c), spec=c.action_spec, normaliser=c.normaliser)
    assert again.ids.stay_id.equals(c.ids.stay_id)
    for a, b in zip(*(rows_until(x, hour, (*SEEN, "action", "ended")) for x in (c, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert ended.sum() < len(k) and not np.array_equal(rows_until(c, hour + 9)[1], rows_until(again, hour + 9)[1])


@pytest.mark.parametrize("source", ["mimic4_store", "mimic3_store"])
def test_ventilation_ignores_the_future(source, request, tmp_path):
    c, store = made(request, source, "ventilation"), request.getfixturevalue(source)
    hour = c.time_h[np.arange(len(c)), np.random.default_rng(6).integers(0, c.mask.sum(1))]
    cut = pd.Series(hour + 1e-6, c.ids.stay_id).reindex(store.stays.stay_id).fillna(np.inf)
    events = store.events().astype({"variable": str, "item": str})
    settings = events.variable.isin(["peep", "fio2", "tidal_volume_set", "tidal_volume"])
    # a setting was in force when it was set, even if written down later; a height does not change
    at = np.where(settings, events.time_h, events.available_h)
    late = (at >= cut[events.stay_id].to_numpy()) & (events.variable != "height")
    rng = np.random.default_rng(0)
    events.loc[late, "value"] = (events.value[late] * rng.uniform(1, 1.1, late.sum())).clip(upper=99)
    events = events[~(late & (rng.random(len(events)) < 0.3))]
    other = EventStore.write(tmp_path / "store", store.stays, events, store.interventions(), store.provenance)
    whole = members(c, end_h=c.ids.end_h, onset_h=c.ids.onset_h)
    again = ventilation_task(other, cohort=whole, normaliser=c.normaliser)
    there = c.ids.stay_id.isin(again.ids.stay_id).to_numpy()
    assert there.mean() > 0.9  # one whose first settings were after the cut may have lost them
    for a, b in zip(*(rows_until(x, hour[there], (*SEEN, "action")) for x in (select(c, there), again)), strict=True):
        np.testing.assert_array_equal(a, b)


def select(c: TaskCharts, keep: np.ndarray) -> TaskCharts:
    "Some of the stays."
    arrays = ("value", "observed", "delta", "freshness", "action", "hours", "reward", "ended", "mask", "time_h")
    return replace(c, ids=c.ids[keep], **{f: getattr(c, f)[keep] for f in arrays})


# ---- pieces


news = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 600)), min_size=1, max_size=60)


@given(news, st.sampled_from([0, 15, 60, 90]))
def test_rows_rest_and_lose_nothing(news, rest):
    at = pd.DataFrame(sorted(set(news)), columns=["stay_id", "minute"])
    rows = rested(at[["stay_id"]].assign(time_h=at.minute / 60), rest / 60)
    for stay, own in at.groupby("stay_id").minute:
        got, expected, own = (rows.time_h[rows.stay_id == stay] * 60).round().astype(int).tolist(), [], own.tolist()
        while own:  # by the definition
            expected.append(max(own[0], expected[-1] + rest) if expected else own[0])
            own = [a for a in own if a > expected[-1]]
        assert got == expected
    with pytest.raises(ValueError, match="min_gap_h"): rested(rows, np.nan)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10), st.sampled_from([0.05, 0.1, 0.3])), max_size=6))
def test_peaks_are_the_highest_total(drugs):
    rows = [(1, a / 2, (a + n) / 2, r) for a, n, r in drugs]
    table = pd.DataFrame(rows, columns=["stay_id", "start_h", "end_h", "rate"])
    table = table.astype({"stay_id": "int64", "start_h": float, "end_h": float, "rate": float})
    spans = pd.DataFrame({"stay_id": 1, "start_h": [0.0, 1.0, 4.0, 4.5, 40.0], "end_h": [1.0, 4.0, 4.5, 30.0, 41.0]})
    grid = np.arange(0, 45, 0.5)
    total = np.array([table.rate[(table.start_h <= t) & (table.end_h > t)].sum() for t in grid])
    by_hand = [total[(grid >= a) & (grid < b)].max() for a, b in zip(spans.start_h, spans.end_h, strict=True)]
    peak = peak_rate(table, spans)
    np.testing.assert_allclose(peak, by_hand, atol=1e-6)
    assert (peak >= mean_rate(table, spans) - 1e-6).all() and (staircase(table).rate > 0).all()


def test_settings_never_come_from_after(mimic4_store):
    who = ventilation(mimic4_store).stays
    known = settings_known_h(mimic4_store, who.stay_id.to_numpy()).reindex(who.stay_id).to_numpy()
    spans = pd.DataFrame({"stay_id": who.stay_id, "start_h": known, "end_h": known + 2})[np.isfinite(known)]
    whole = settings_in_force(mimic4_store, spans)
    assert np.isfinite(whole).all(axis=None)
    events = mimic4_store.events()
    end = spans.set_index("stay_id").end_h.reindex(events.stay_id).to_numpy()
    events = events[(events.time_h.to_numpy() < end) | (events.variable == "height").to_numpy()]
    young = MemoryStore(mimic4_store.stays, events, mimic4_store.interventions())
    pd.testing.assert_frame_equal(settings_in_force(young, spans), whole)


# ---- one stay by hand


def by_hand(out_h=90.0, death_h=np.nan, died=False) -> MemoryStore:
    "Three stays; the first has the lactate, the pressure and the drugs."
    ids = [1, 2, 3]
    stays = pd.DataFrame(dict(stay_id=ids, subject_id=[10, 20, 30], age_years=60.0, sex="M", out_h=[out_h, 90.0, 90.0]))
    stays = stays.assign(readmission=False, death_h=[death_h, np.nan, np.nan], hospital_out_h=99.0)
    stays["hospital_death"] = pd.array([died, False, False], dtype="boolean")
    rows = [(s, t, t, "map", x, "a") for s in ids for t, x in ((0.0, 75), (1.5, 60), (2.0, 65), (4.0, 75), (7.0, 90))]
    rows += [(s, 0.0, 0.0, "lactate", 2, "a") for s in ids] + [(1, 1.5, 3.5, "lactate", 5, "a")]
    rows += [(s, 0.0, 0.0, v, x, "a") for s in ids for v, x in (("peep", 5), ("fio2", 40), ("tidal_volume_set", 500))]
    rows += [(1, t, t, "spo2", x, "a") for t, x in ((0.0, 96), (4.0, 99))] + [(1, 2.5, 9.0, "peep", 10, "a")]
    given = [(1, 2.0, 3.0, "norepinephrine", 0.3, np.nan, "a"), (2, 0.0, 9.0, "norepinephrine", 0.1, np.nan, "a"),
             (1, 1.0, 2.0, "crystalloid", 500.0, 500.0, "a"), (3, 0.0, 9.0, "crystalloid", 50.0, np.nan, "a")]
    return MemoryStore(stays, frame(rows, EVENTS), frame(given, INTERVENTIONS))


THREE = (*(Last(v) for v in ("map", "lactate", "spo2")), *(f for f in MEDDREAMER_40 if f.name == "sofa"))
HAND = dict(features=THREE, split=(1, 0, 0))


def test_reward_of_one_stay_by_hand():
    store = by_hand(death_h=5.25, died=True)
    c = sepsis_task(store, cohort=cohort(store, onset_h=2.0), outcome="hospital", **HAND)
    n = c.mask[0].sum()
    # news at 0, 1.5, 2, 3.5, 4 h, death at 5.25 h; a row rests for an hour
    assert np.allclose(c.time_h[0, :n], [0, 1.5, 2.5, 3.5, 4.5, 5.25])
    assert c.ended[0, :n].tolist() == [False] * 5 + [True]
    lactate = -2 * np.tanh(3)
    sofa = c.normaliser.only("sofa").inverse(c.value[0, :n, 3:4])[:, 0].round()  # clipped at quantiles: 3.99
    seen = np.where(np.cumsum(c.observed[0, :n, 3]) > 0, sofa, np.nan)
    change = np.nan_to_num(-0.125 * np.diff(seen)) - 0.025 * ((np.diff(seen) == 0) & (seen[1:] > 0))
    np.testing.assert_allclose(c.reward[0, 1:n], change + [0, 0, lactate, 0, -15], atol=1e-5)
    assert seen[-1] == 4 and c.about["outcome"] == "hospital"
    # 0.3 ran from 2 to 3 h: in two gaps; 500 mL from 1 to 2 h: half of it before 1.5 h, half of it after
    drugs = [SepsisGrid.decode(c.action_spec, c.action[0, 1:n])[j] for j in (0, 1)]
    assert (drugs[0] > 0).tolist() == [False, True, True, False, False]
    assert (drugs[1] > 0).tolist() == [True, True, False, False, False]
    assert c.action_spec.units == ("ug/kg/min NEE", "mL/h") and not c.ended[1:].any() and c.reward[1:].min() > -1


def test_an_outcome_is_paid_only_where_the_stay_ended():
    for store, paid in ((by_hand(out_h=6.0, death_h=50.0, died=True), -15), (by_hand(out_h=6.0), 15), (by_hand(), 0)):
        how = dict(cohort=cohort(store, onset_h=2.0), outcome="hospital", window_h=(-2, 6), **HAND)
        c = sepsis_task(store, **how)
        assert c.ended.any(1).tolist() == [bool(paid), False, False]
        assert np.allclose(np.round(c.reward[0].sum() / 15) * 15, paid)
        whole = sepsis_task(store, **how, cut="end")
        assert whole.ended.any(1).all() and (whole.ended.sum(1) == 1).all()
    stays = store.stays.assign(hospital_death=pd.array([pd.NA, False, False], dtype="boolean"))
    lost = replace(store, stays=stays)
    how = dict(cohort=cohort(lost, onset_h=2.0), outcome="hospital", **HAND)
    assert len(sepsis_task(lost, **how)) == 3  # it was cut: nobody needs to know
    with pytest.warns(UserWarning, match="spo2"): left = sepsis_task(lost, **how, cut="end")
    assert left.ids.stay_id.tolist() == [2, 3] and left.about["outcome_unknown"] == 1
    assert left.feature_names == ("map", "lactate", "sofa")  # nobody else had a SpO2


def test_ventilation_of_one_stay_by_hand():
    store = by_hand()
    stays = Cohort("v", cohort(store, onset_h=0.0).stays.assign(end_h=6.0), pd.DataFrame())
    c = ventilation_task(store, cohort=stays, **HAND)
    n = c.mask[0].sum()
    assert np.allclose(c.time_h[0, :n], [0, 1.5, 2.5, 3.5, 4.5]) and not c.ended.any()
    # PEEP 5 until 2.5 h, then 10, though that was written down only at 9 h; FiO2 40; 500 mL on 70.8 kg: 7.06 mL/kg
    assert c.action[0, :n].tolist() == [-1, 4, 4, 13, 13]
    # new: map 60 at 1.5 h, 65 in the row of 2.5 h, only the lactate at 3.5 h, 75 and SpO2 99 in the row of 4.5 h
    np.testing.assert_allclose(c.reward[0, :n], [0, -0.5, -0.5, 0, 0.5])
    cut = ventilation_task(store, cohort=stays, hours=3.0, **HAND)
    assert cut.time_h.max() == 2.5


def test_charts_of_sequences_made_elsewhere():
    store = by_hand()
    s = irregular(store, cohort(store, onset_h=2.0), features=THREE, split=(1, 0, 0))
    c = charts_of(s, RaghuReward())
    assert np.array_equal(c.mask, s.mask) and np.array_equal(c.observed, s.observed) and c.action_spec.n == 25
    np.testing.assert_array_equal(c.value, s.filled())
    np.testing.assert_allclose(c.hours[:, 1:][c.mask[:, 1:]], np.diff(s.time_h, axis=1)[c.mask[:, 1:]], rtol=1e-6)
    spec = SepsisGrid((0.1, 0.2, 0.3), (10.0, 20.0, 30.0))
    assert charts_of(s, RaghuReward(), spec=spec).action_spec is spec
    set_at = dict(alignment={**s.alignment, "action": "ventilation"}, action=np.full((*s.mask.shape, 3), 30.0))
    breaths = charts_of(replace(s, **set_at), VentilationReward())
    assert breaths.action_spec.n == 18 and set(np.unique(breaths.action)) == {-1, 9 + 0 + 2}
    own = s.normaliser.inverse(s.filled())[..., 0]
    np.testing.assert_array_equal(c.physical("map"), np.where(c.mask, own, np.nan))


# ---- errors


def test_errors_say_what_is_wrong(challenge_store):
    with pytest.raises(ValueError, match="norepinephrine.*crystalloid or colloid"):
        sepsis_task(challenge_store)
    with pytest.raises(ValueError, match="peep; tidal_volume_set or tidal_volume; spo2"):
        ventilation_task(challenge_store)


@pytest.mark.parametrize(("how", "said"), [
    (dict(cohort=Cohort("nobody", cohort(by_hand()).stays.iloc[:0], pd.DataFrame())), "nobody"),
    (dict(features=(Last("map"),)), "needs sofa, lactate"),
    (dict(features=()), "no features"),
    (dict(split=(0, 1, 0)), "training fold"),
    (dict(cut="both"), "cut='both'"),
    (dict(outcome="90d"), "no death after hospital discharge"),
    (dict(outcome="year"), "year"),
    (dict(min_gap_h=-1.0), "min_gap_h=-1"),
    (dict(window_h=(5, 5)), "window_h"),
    (dict(fluids=("water",)), "water"),
])  # fmt: skip
def test_wrong_settings_are_named(how, said):
    store = by_hand()
    with pytest.raises(ValueError, match=said):
        sepsis_task(store, **{**HAND, "cohort": cohort(store, onset_h=2.0), "outcome": "hospital", **how})


def test_what_does_not_fit_a_grid():
    store = by_hand()
    s = irregular(store, cohort(store, onset_h=2.0), **HAND, action="continuous")
    with pytest.raises(ValueError, match="has doses"): charts_of(s, RaghuReward())
    c = sepsis_task(store, cohort=cohort(store, onset_h=2.0), outcome="hospital", **HAND)
    with pytest.raises(ValueError, match="ids outside 0..24"): replace(c, action=c.action + 25)
    features = (*THREE, Last("ph"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = irregular(store, cohort(store, onset_h=2.0), features=features, split=(1, 0, 0))
    with pytest.raises(ValueError, match="never observed in a training stay: ph; drop them"):
        charts_of(s, RaghuReward())
    given = store.all_interventions
    dry = replace(store, all_interventions=given[given.variable != "norepinephrine"])
    with pytest.raises(ValueError, match="norepinephrine or"): sepsis_task(dry, cohort=cohort(dry), **HAND)


# ---- learning


@pytest.mark.parametrize("task", ["sepsis", "ventilation"])
@pytest.mark.parametrize("source", STORES)
def test_a_world_model_learns_from_them(source, task, request):
    c = made(request, source, task)
    few = Descent(steps=2, batch=4, length=12, validate_every=1)
    model, history = train_world(c, small(), few, progress=False)
    assert np.isfinite(history.loss).all() and model.n_actions == c.action_spec.n and scale() == "smoke"
    assert Windows(c, 12).places[:, 0].max() < len(c)
