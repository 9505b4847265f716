"Small event stores held in memory, made by hypothesis, and a way to change all of their future."

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from medsim.data.cohorts import Cohort
from medsim.data.variables import vocabulary

VOCABULARY = vocabulary()
CHARTED = [
    "heart_rate", "sbp", "map", "temperature", "spo2", "fio2", "pao2", "paco2", "lactate", "creatinine", "platelets",
    "bilirubin_total", "wbc", "gcs_eye", "gcs_verbal", "gcs_motor", "gcs_untestable", "urine", "vent_setting",
    "oxygen_device", "extubation", "weight", "peep",
]  # fmt: skip
GIVEN = ["norepinephrine", "epinephrine", "dopamine", "vasopressin", "crystalloid", "colloid", "invasive_ventilation"]
EVENTS = ["stay_id", "time_h", "available_h", "variable", "value", "item"]
INTERVENTIONS = ["stay_id", "start_h", "end_h", "variable", "rate", "amount", "item"]


@dataclass(frozen=True)
class MemoryStore:
    "What `EventStore` offers, from frames."

    stays: pd.DataFrame
    all_events: pd.DataFrame
    all_interventions: pd.DataFrame
    provenance: dict = field(default_factory=lambda: {"source": "made up", "open_data": True})

    def _pick(self, table, variables, stay_ids):
        names = [variables] if isinstance(variables, str) else variables
        keep = pd.Series(True, table.index)
        if names is not None: keep &= table.variable.isin(list(names))
        if stay_ids is not None: keep &= table.stay_id.isin(list(stay_ids))
        return table[keep].sort_values(list(table.columns[:3]), kind="stable").reset_index(drop=True)

    def events(self, variables=None, stay_ids=None):
        return self._pick(self.all_events, variables, stay_ids)

    def interventions(self, variables=None, stay_ids=None):
        return self._pick(self.all_interventions, variables, stay_ids)


def frame(rows, columns):
    types = {"stay_id": "int64", "variable": str, "item": str}
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({c: types.get(c, float) for c in columns})


hours = st.integers(-8, 80).map(lambda n: n / 2) | st.floats(-4, 40, allow_nan=False).map(lambda t: round(t, 3))
delays = st.sampled_from([0.0, 0.0, 0.1, 0.5, 2.0, 6.0])


@st.composite
def event_rows(draw, stays, start=-4.0):
    name = draw(st.sampled_from(CHARTED))
    low, high = VOCABULARY.loc[name, ["low", "high"]]
    time = max(draw(hours), start)
    value = float(low + (high - low) * draw(st.integers(0, 20)) / 20)
    item = draw(st.sampled_from(["chartevents:1", "labevents:2"]))
    return draw(st.sampled_from(stays)), time, time + draw(delays), name, value, item


@st.composite
def intervention_rows(draw, stays, start=-4.0):
    name, time = draw(st.sampled_from(GIVEN)), max(draw(hours), start)
    length = draw(st.sampled_from([0.25, 1.0, 3.5, 7.5, 20.0]))
    rate = 1.0 if name == "invasive_ventilation" else draw(st.sampled_from([0.05, 0.1, 0.3, 20.0, 200.0]))
    return draw(st.sampled_from(stays)), time, time + length, name, rate, rate * length, "inputevents:1"


@st.composite
def stores(draw, n_stays=2, n_events=40, n_given=8):
    ids = list(range(1, n_stays + 1))
    stays = pd.DataFrame(dict(stay_id=ids, subject_id=ids, age_years=60.0, sex="F", out_h=36.0, death_h=np.nan))
    stays["hospital_death"] = pd.array([False] * n_stays, dtype="boolean")
    stays["readmission"] = pd.array([False] * n_stays, dtype="boolean")
    events = frame(draw(st.lists(event_rows(ids), min_size=1, max_size=n_events)), EVENTS)
    given = frame(draw(st.lists(intervention_rows(ids), max_size=n_given)), INTERVENTIONS)
    return MemoryStore(stays, events, given)


@st.composite
def futures(draw, store, cut):
    "The store with all that is known from `cut` on changed, dropped or added to; what runs then ends otherwise."
    ids = store.stays.stay_id.tolist()
    events, given = store.all_events, store.all_interventions
    late, unborn = events.available_h >= cut, given.start_h >= cut
    kept = events[late & (draw(st.integers(0, 3)) != np.arange(len(events)) % 4)]
    kept = kept.assign(value=kept.value * 1.5 + 1, available_h=kept.available_h + draw(st.sampled_from([0.0, 3.0])))
    rows = draw(st.lists(event_rows(ids), max_size=6))
    new = frame([(s, t, max(a, cut), v, x, i) for s, t, a, v, x, i in rows], EVENTS)  # measured at any time, known late
    running = ~unborn & (given.end_h >= cut)
    until = max(cut, draw(hours)) + draw(st.sampled_from([0.0, 0.25, 9.0]))
    going = given[running].assign(end_h=until, amount=draw(st.sampled_from([1.0, 1e6])))
    begun = frame(draw(st.lists(intervention_rows(ids, start=cut), max_size=4)), INTERVENTIONS)
    stays = store.stays.assign(out_h=max(36.0, cut) + 5, hospital_death=pd.array([True] * len(ids), dtype="boolean"))
    return replace(
        store, stays=stays, all_events=pd.concat([events[~late], kept, new], ignore_index=True),
        all_interventions=pd.concat([given[~unborn & ~running], going, begun], ignore_index=True),
    )  # fmt: skip


def cohort(store, onset_h=14.0, known_h=20.0):
    stays = store.stays[["stay_id", "subject_id"]].assign(onset_h=onset_h, known_h=known_h)
    return Cohort("made up", stays, pd.DataFrame(), open_data=True)
