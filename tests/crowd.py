"Stores in memory and random patients: what the tests of scores, ventilation and cohorts share."

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

EVENT_COLUMNS = ["stay_id", "time_h", "available_h", "variable", "value"]
GIVEN_COLUMNS = ["stay_id", "start_h", "end_h", "variable", "rate"]


def frame(rows, columns):
    "A typed frame of hand-made rows (or of a frame), also when there are none."
    numbers = {c: "int64" if c == "stay_id" else float for c in columns if c != "variable"}
    return pd.DataFrame(rows, columns=columns).astype(numbers)


@dataclass
class Frames:
    "An event store in memory: what `sofa` reads of one, without the disk."

    stays: pd.DataFrame
    _events: list = field(default_factory=list)
    _given: list = field(default_factory=list)
    provenance: dict = field(default_factory=dict)

    def _pick(self, rows, variables, stay_ids):
        wanted = [variables] if isinstance(variables, str) else variables
        if wanted is not None: rows = rows[rows.variable.isin(list(wanted))]
        if stay_ids is not None: rows = rows[rows.stay_id.isin(list(stay_ids))]
        return rows.reset_index(drop=True).astype({"variable": "category"})

    def events(self, variables=None, stay_ids=None):
        return self._pick(frame(self._events, EVENT_COLUMNS).sort_values(["stay_id", "time_h"]), variables, stay_ids)

    def interventions(self, variables=None, stay_ids=None):
        return self._pick(frame(self._given, GIVEN_COLUMNS).sort_values(["stay_id", "start_h"]), variables, stay_ids)


RANGES = dict(
    platelets=(5, 300), bilirubin_total=(0, 15), map=(30, 110), creatinine=(0, 6), pao2=(40, 200), fio2=(21, 100),
    gcs_eye=(1, 4), gcs_verbal=(1, 5), gcs_motor=(1, 6), gcs_total=(3, 15), gcs_untestable=(1, 1), urine=(0, 200),
    vent_setting=(1, 1), noninvasive_setting=(1, 1), oxygen_device=(1, 1), extubation=(1, 1),
)  # fmt: skip
DRUGS = ["norepinephrine", "epinephrine", "dopamine", "dobutamine", "vasopressin", "phenylephrine"]
GIVEN = [*DRUGS, "invasive_ventilation", "noninvasive_ventilation"]


def crowd_events(rng, n, size, after=-10.0):
    "`size` random events of the stays 0 to n - 1, none available before `after`; times in quarters of an hour."
    names = rng.choice(list(RANGES), size)
    low, high = np.array([RANGES[name] for name in names]).T
    time = rng.integers(-40, 160, size) / 4
    known = np.maximum(time, after) + rng.integers(0, 24, size) / 4 * (rng.random(size) < 0.5)
    value = np.floor(rng.uniform(low, high + 1))
    columns = dict(stay_id=rng.integers(0, n, size), time_h=time, available_h=known, variable=names, value=value)
    return pd.DataFrame(columns)


def crowd_given(rng, n, size, after=-10.0):
    "`size` random infusions and ventilations of the stays 0 to n - 1, none begun before `after`."
    start = after + rng.integers(0, 200, size) / 4
    rate = rng.choice([0.04, 0.1, 0.2, 4.0, 6.0, 20.0], size)
    length = rng.integers(1, 80, size) / 4
    columns = dict(stay_id=rng.integers(0, n, size), start_h=start, end_h=start + length, rate=rate)
    return pd.DataFrame(columns).assign(variable=rng.choice(GIVEN, size))


def crowd_stays(rng, n):
    return pd.DataFrame(dict(stay_id=range(n), subject_id=range(n), out_h=rng.integers(1, 200, n) / 4))
