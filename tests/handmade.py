"Folders of ICU records made by hand: small enough to break one cell at a time, every cell easy to find in a message."

import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import pytest

from medsim.data.store import EventStore, extract

Tables = dict[str, pd.DataFrame]


def frame(columns: str, *rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns.split(), dtype=object)


def mimic4() -> Tables:
    "MIMIC-IV: the first patient lives, the second dies in hospital; one of each kind of row."
    person, mm = (71000001, 72000001), "mm Hg"
    return {
        "icu/icustays": frame(
            "subject_id hadm_id stay_id first_careunit intime outtime",
            (71000001, 72000001, 73000001, "Medical ICU, east wing", "2150-01-01 08:13:00", "2150-01-03 09:17:00"),
            (71000002, 72000002, 73000002, "Surgical ICU, west wing", "2151-05-05 10:19:00", "2151-05-07 11:23:00"),
        ),
        "hosp/patients": frame(
            "subject_id gender anchor_age anchor_year dod",
            (71000001, "F", 64, 2150, None),
            (71000002, "M", 51, 2149, "2151-05-07"),
        ),
        "hosp/admissions": frame(
            "subject_id hadm_id admittime dischtime deathtime hospital_expire_flag",
            (71000001, 72000001, "2150-01-01 07:03:00", "2150-01-09 12:29:00", None, 0),
            (71000002, 72000002, "2151-05-05 06:07:00", "2151-05-07 11:31:00", "2151-05-07 11:29:00", 1),
        ),
        "icu/chartevents": frame(
            "subject_id stay_id charttime storetime itemid value valuenum valueuom",
            (71000001, 73000001, "2150-01-01 09:41:00", "2150-01-01 09:43:00", 220045, 81.0625, 81.0625, "bpm"),
            (71000001, 73000001, "2150-01-01 10:41:00", "2150-01-01 10:43:00", 220045, 82.0625, 82.0625, "bpm"),
            (71000002, 73000002, "2151-05-05 11:37:00", "2151-05-05 11:47:00", 223761, 102.2, 102.2, "°F"),
            (71000002, 73000002, "2151-05-05 12:37:00", "2151-05-05 12:47:00", 223835, 0.6, 0.6, None),
            (71000002, 73000002, "2151-05-05 13:37:00", "2151-05-05 13:47:00", 223835, 60, 60, None),
        ),
        "hosp/labevents": frame(
            "subject_id hadm_id specimen_id itemid charttime storetime value valuenum valueuom",
            (*person, 74000001, 50813, "2150-01-01 12:47:00", "2150-01-01 13:49:00", 2.0625, 2.0625, "mmol/L"),
            (*person, 74000002, 50821, "2150-01-01 12:53:00", "2150-01-01 12:59:00", 80.125, 80.125, mm),
            (*person, 74000002, 52033, "2150-01-01 12:53:00", "2150-01-01 12:59:00", "ART.", None, None),
            (*person, 74000003, 50821, "2150-01-01 14:53:00", "2150-01-01 14:59:00", 40.125, 40.125, mm),
            (*person, 74000003, 52033, "2150-01-01 14:53:00", "2150-01-01 14:59:00", "VEN.", None, None),
        ),
        "icu/inputevents": frame(
            "subject_id stay_id starttime endtime itemid amount amountuom rate rateuom patientweight statusdescription",
            _input(221906, "10:51", "11:51", 0.4875, "mg", 0.125, "mcg/kg/min", 65.125),  # norepinephrine
            _input(221906, "12:51", "13:51", 0.4875, "mg", None, None, 65.125),  # only its amount charted
            _input(222315, "10:51", "11:51", 2.4, "units", 2.4, "units/hour", 65.125),  # vasopressin
            _input(222315, "12:51", "13:51", 2.4, "units", 0.04, "units/min", 65.125),
            _input(222042, "10:51", "11:51", 5.125, "mg", 1.0625, "mcg/kg/min", 65.125),  # nicardipine
            _input(225168, "10:51", "11:51", 350.25, "ml", 350.25, "mL/hour", 65.125),  # red cells
            _input(225828, "10:00", "17:30", 1500, "ml", None, None, 65.125),  # lactated Ringer's
        ),
    }  # fmt: skip


def _input(item: int, start: str, end: str, *rest: object) -> tuple:
    return (71000001, 73000001, f"2150-01-01 {start}:00", f"2150-01-01 {end}:00", item, *rest, "FinishedRunning")


def mimic3() -> Tables:
    "MIMIC-III: a MetaVision and a CareVue stay; a venous gas, an error, a rewritten order, rates charted at moments."
    return {
        "ICUSTAYS": frame(
            "ROW_ID SUBJECT_ID HADM_ID ICUSTAY_ID DBSOURCE FIRST_CAREUNIT INTIME OUTTIME",
            (1, 81000001, 82000001, 83000001, "metavision", "MICU", "2150-01-01 08:00:00", "2150-01-03 08:00:00"),
            (2, 81000002, 82000002, 83000002, "carevue", "SICU", "2151-05-05 10:00:00", "2151-05-07 10:00:00"),
        ),
        "PATIENTS": frame(
            "ROW_ID SUBJECT_ID GENDER DOB DOD",
            (1, 81000001, "F", "2086-01-01 00:00:00", None),
            (2, 81000002, "M", "1850-05-05 00:00:00", "2151-06-01 00:00:00"),  # older than 89: moved back
        ),
        "ADMISSIONS": frame(
            "ROW_ID SUBJECT_ID HADM_ID ADMITTIME DISCHTIME DEATHTIME HOSPITAL_EXPIRE_FLAG",
            (1, 81000001, 82000001, "2150-01-01 07:00:00", "2150-01-09 12:00:00", None, 0),
            (2, 81000002, 82000002, "2151-05-05 06:00:00", "2151-05-09 11:00:00", None, 0),
        ),
        "CHARTEVENTS": frame(
            "ROW_ID SUBJECT_ID ICUSTAY_ID ITEMID CHARTTIME STORETIME VALUE VALUENUM VALUEUOM ERROR",
            (1, 81000001, 83000001, 220045, "2150-01-01 09:00:00", "2150-01-01 09:05:00", "80", 80, "bpm", 0),
            (2, 81000001, 83000001, 220045, "2150-01-01 10:00:00", "2150-01-01 10:05:00", "300", 300, "bpm", 1),
            (3, 81000002, 83000002, 211, "2151-05-05 11:00:00", "2151-05-05 11:05:00", "90", 90, "BPM", None),
            (4, 81000002, 83000002, 678, "2151-05-05 11:00:00", "2151-05-05 11:05:00", "102.2", 102.2, "Deg. F", None),
            (5, 81000002, 83000002, 762, "2151-05-05 12:30:00", "2151-05-05 12:35:00", "70", 70, None, None),
        ),
        "LABEVENTS": frame(
            "ROW_ID SUBJECT_ID HADM_ID ITEMID CHARTTIME VALUE VALUENUM VALUEUOM FLAG",
            (1, 81000001, 82000001, 50821, "2150-01-01 09:00:00", "80", 80, "mm Hg", None),
            (2, 81000001, 82000001, 50800, "2150-01-01 09:00:00", "ART", None, None, None),
            (3, 81000001, 82000001, 50821, "2150-01-01 11:00:00", "40", 40, "mm Hg", None),
            (4, 81000001, 82000001, 50800, "2150-01-01 11:00:00", "VEN", None, None, None),
        ),
        "INPUTEVENTS_MV": frame(
            "SUBJECT_ID ICUSTAY_ID STARTTIME ENDTIME ITEMID AMOUNT AMOUNTUOM RATE RATEUOM PATIENTWEIGHT"
            " STATUSDESCRIPTION",
            *((81000001, 83000001, *h, 221906, 0.6, "mg", 0.1, "mcg/kg/min", 100, status) for h, status in (
                (("2150-01-01 10:00:00", "2150-01-01 11:00:00"), "FinishedRunning"),
                (("2150-01-01 12:00:00", "2150-01-01 13:00:00"), "Rewritten"),
                (("2150-01-01 14:00:00", "2150-01-01 15:00:00"), "Stopped"),
            )),
        ),
        "INPUTEVENTS_CV": frame(
            "ROW_ID SUBJECT_ID ICUSTAY_ID CHARTTIME ITEMID AMOUNT AMOUNTUOM RATE RATEUOM STOPPED ORDERID LINKORDERID",
            (1, 81000002, 83000002, "2151-05-05 11:00:00", 30120, None, None, 0.1, "mcgkgmin", None, 91, 91),
            (2, 81000002, 83000002, "2151-05-05 13:30:00", 30120, None, None, None, None, "Stopped", 92, 91),
            (3, 81000002, 83000002, "2151-05-05 11:00:00", 30047, None, None, 8, "mcgmin", None, 93, 93),  # no weight
            (4, 81000002, 83000002, "2151-05-05 13:00:00", 30047, None, None, 7, "mcgmin", None, 94, 93),  # 70 kg
            (5, 81000002, 83000002, "2151-05-05 15:00:00", 30051, None, None, 0.04, "Umin", None, 95, 95),
            (6, 81000002, 83000002, "2151-05-05 14:00:00", 30018, 10, "ml", None, None, None, 96, 96),
            (7, 81000002, 83000002, "2151-05-05 14:00:00", 30018, 10, "ml", None, None, None, 97, 97),  # a second bag
            (8, 81000002, 83000002, "2151-05-05 14:00:00", 30001, 350, "ml", None, None, None, 98, 98),  # red cells
        ),
    }  # fmt: skip


def tidy() -> Tables:
    "Anyone's own tables: clock times in the first stay, hours in the second."
    return {
        "static": frame(
            "subject_id stay_id age sex weight intime outtime death_time",
            (61000001, 63000001, 64, "F", 65.125, "2150-01-01 08:13:00", "2150-01-03 08:13:00", None),
            (61000002, 63000002, 51, "male", 70.125, 0, 48, 47.5),
        ),
        "events": frame(
            "stay_id time available_time concept value unit",
            (63000001, "2150-01-01 09:13:00", None, "heart_rate", 81.0625, "/min"),
            (63000002, 1.5, 2.5, "lactate", 2.0625, "mmol/L"),
            (63000002, 1.5, None, "temperature", 102.2, "degF"),
        ),
        "interventions": frame(
            "stay_id start end concept rate rate_unit amount amount_unit",
            (63000001, "2150-01-01 09:13:00", "2150-01-01 11:13:00", "norepinephrine", 0.1, "ug/kg/min", None, None),
            (63000002, 1, 2, "crystalloid", None, None, 500, "mL"),
        ),
    }


def eicu() -> Tables:
    "One stay of eICU with a few of its tables."
    return {
        "patient": frame(
            "patientunitstayid patienthealthsystemstayid gender age uniquepid unitdischargeoffset unitdischargestatus"
            " hospitaldischargeoffset hospitaldischargestatus unittype unitvisitnumber admissionweight admissionheight",
            (51000001, 52000001, "Male", "> 89", "002-53001", 1440, "Alive", 2880, "Expired", "SICU", 1, 77.5, 167),
        ),
        "lab": frame(
            "patientunitstayid labresultoffset labname labresult labmeasurenamesystem",
            (51000001, 61, "lactate", 2.0625, "mmol/L"),
        ),
        "infusionDrug": frame(
            "patientunitstayid infusionoffset drugname drugrate patientweight",
            (51000001, 60, "Norepinephrine (mcg/min)", 7.75, 77.5),
            (51000001, 120, "Norepinephrine (mcg/min)", "OFF", 77.5),
        ),
    }


def write(folder: Path, tables: Mapping[str, pd.DataFrame], suffix: str = ".csv.gz") -> Path:
    for name, table in tables.items():
        file = folder / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".parquet":
            table.astype("string").to_parquet(file)
        else:
            table.to_csv(file, index=False)
    return folder


def cells(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    "Every value long enough that it can stand in a message only because it was copied."
    found = {str(v) for t in tables.values() for c in t for v in t[c] if v is not None}
    return sorted(v for v in found if len(v) >= 6 and not v.startswith(("mcg", "mL", "units", "mmol")))


def refused(
    source: Path, out: Path, *said: str, secret: Iterable[str] = (), error: type[BaseException] = ValueError
) -> str:
    "The extraction is refused in clear words, quotes none of the secrets and leaves nothing behind; its message."
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(error) as caught:
        extract(source, out, progress=False)
    text, trace = str(caught.value), "".join(traceback.format_exception(caught.value))
    for word in said:
        assert word in text, f"{word!r} is not in: {text}"
    for cell in secret:
        assert cell not in text and cell not in trace, "a cell of the source stands in the message or its traceback"
    assert sorted(p.name for p in out.parent.iterdir()) == before, "something was left behind"
    return text


def dropped(store: EventStore, variable: str) -> dict[str, int]:
    return store.provenance["account"]["dropped"].get(variable, {})
