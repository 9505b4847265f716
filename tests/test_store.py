"The event store: whole or not at all, the same bytes every time, bad input refused in words that quote no patient."

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import handmade
import numpy as np
import pandas as pd
import pytest
from handmade import Tables, cells, dropped, refused, write

from medsim.core.paths import OutputExists
from medsim.data import store as store_room
from medsim.data.store import COLUMNS, EventStore, extract

FILES = {"provenance.json", *(f"{t}.parquet" for t in COLUMNS)}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def change(tables: Tables, table: str, column: str, value: object, row: int = 0) -> Tables:
    tables[table].loc[row, column] = value
    return tables


# ---- what is written


def test_a_store_has_four_files_and_nothing_lies_beside_it(tmp_path):
    extract(write(tmp_path / "records", handmade.mimic4()), tmp_path / "store", progress=False)
    assert {p.name for p in (tmp_path / "store").iterdir()} == FILES
    assert {p.name for p in tmp_path.iterdir()} == {"records", "store"}


def test_the_contract_of_the_tables(tmp_path):
    got = extract(write(tmp_path / "records", handmade.mimic4()), tmp_path / "store", progress=False)
    events, given = got.events(), got.interventions()
    for name, frame in dict(stays=got.stays, events=events, interventions=given).items():
        assert frame.columns.tolist() == list(COLUMNS[name])
    assert (events.available_h >= events.time_h).all() and (given.end_h > given.start_h).all()
    assert events.equals(events.sort_values(["stay_id", "time_h"], kind="stable"))
    assert given.equals(given.sort_values(["stay_id", "start_h"], kind="stable"))
    assert got.events("lactate", [73000001]).value.tolist() == [2.0625] and got.events("lactate", [73000002]).empty
    assert got.events([]).empty and got.interventions(stay_ids=[]).empty
    first, second = got.stays.itertuples()
    assert (first.age_years, first.sex, first.hospital_death) == (64, "F", False) and np.isnan(first.death_h)
    assert (second.age_years, second.sex, second.hospital_death) == (53, "M", True)
    assert np.isclose(second.death_h, 49 + 10 / 60) and np.isclose(second.out_h, 49 + 4 / 60)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_form_of_the_files_does_not_matter(tmp_path, suffix):
    a = extract(write(tmp_path / "a", handmade.mimic4()), tmp_path / "store_a", progress=False)
    b = extract(write(tmp_path / "b", handmade.mimic4(), suffix), tmp_path / "store_b", progress=False)
    for table in COLUMNS:
        assert digests(a.folder)[f"{table}.parquet"] == digests(b.folder)[f"{table}.parquet"]


def test_the_order_of_rows_does_not_matter(tmp_path):
    tables = handmade.mimic4()
    a = extract(write(tmp_path / "a", tables), tmp_path / "store_a", progress=False)
    b = extract(write(tmp_path / "b", {n: t[::-1] for n, t in tables.items()}), tmp_path / "store_b", progress=False)
    for table in COLUMNS:
        assert digests(a.folder)[f"{table}.parquet"] == digests(b.folder)[f"{table}.parquet"]


def test_twice_the_same_bytes_by_hand(tmp_path):
    folder = write(tmp_path / "records", handmade.mimic3())
    a, b = (extract(folder, tmp_path / n, progress=False, threads=t) for n, t in (("a", 1), ("b", 4)))
    assert digests(a.folder) == digests(b.folder)


def test_twice_the_same_bytes_of_the_meds_demo(meds_demo, meds_store, tmp_path):
    "Large enough for several row groups, which threads could fill in another order."
    again = extract(meds_demo, tmp_path / "again", progress=False)
    assert digests(again.folder) == digests(meds_store.folder)


def test_a_fresh_process_reads_the_same(mimic4_store):
    code = """if True:
        import sys, pandas as pd
        from medsim.data.store import EventStore
        s = EventStore.open(sys.argv[1])
        for t in (s.stays, s.events(), s.interventions()):
            print(len(t), pd.util.hash_pandas_object(t, index=False).sum())
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(mimic4_store.folder)], capture_output=True, text=True, check=True
    )
    here = [mimic4_store.stays, mimic4_store.events(), mimic4_store.interventions()]
    assert done.stdout.split("\n")[:3] == [f"{len(t)} {pd.util.hash_pandas_object(t, index=False).sum()}" for t in here]


def labels(column: pd.Series) -> np.ndarray:
    coded = pd.Categorical(column)
    return coded.categories.to_numpy(object)[coded.codes]


@pytest.mark.parametrize("store", ["mimic4_store", "mimic3_store", "eicu_store", "meds_store"])
def test_reading_by_parts_gives_the_whole(store, request):
    """Read plainly, read through the store, and read variable by variable, the rows are the same.

    Labels are dictionaries that each row group of the file writes for itself: joined wrongly, they give wrong items."""
    store = request.getfixturevalue(store)
    plain = pd.read_parquet(store.folder / "events.parquet")
    whole = store.events()
    for column in ("variable", "item"):
        assert (labels(whole[column]) == labels(plain[column])).all()
    for variable in ("lactate", "map", "resp_rate"):
        part, same = store.events(variable), plain[plain.variable == variable]
        assert (part.value.to_numpy() == same.value.to_numpy()).all()
        assert (labels(part.item) == labels(same["item"])).all()


def test_provenance_names_no_machine_and_no_clock(mimic4_store, tmp_path):
    text = (mimic4_store.folder / "provenance.json").read_text()
    assert str(Path.home()) not in text and str(tmp_path.parent) not in text and os.uname().nodename not in text
    assert json.loads(text) == mimic4_store.provenance
    assert mimic4_store.provenance["source"]["folder"] == "mimic-iv-demo"
    assert mimic4_store.provenance["rows"] == {
        "stays": 140,
        "events": len(mimic4_store.events()),
        "interventions": len(mimic4_store.interventions()),
    }


# ---- what is refused


def test_not_a_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "store", "nowhere")
    (tmp_path / "file.txt").write_text("72000001")
    refused(tmp_path / "file.txt", tmp_path / "store", "file.txt", secret=["72000001"])


def test_an_unknown_layout(tmp_path):
    tables = {"visits": handmade.mimic4()["icu/icustays"]}
    refused(write(tmp_path / "records", tables), tmp_path / "store", "unknown layout", "visits", secret=cells(tables))


@pytest.mark.parametrize("table", [*handmade.mimic4()])
@pytest.mark.parametrize("part", [0.2, 0.9])
def test_a_truncated_gzip(tmp_path, table, part):
    tables = handmade.mimic4()
    file = write(tmp_path / "records", tables) / f"{table}.csv.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    refused(tmp_path / "records", tmp_path / "store", file.name, "copy it again", secret=cells(tables))


REQUIRED = [
    ("icu/icustays", "intime"),
    ("hosp/patients", "anchor_age"),
    ("hosp/admissions", "deathtime"),
    ("icu/chartevents", "valuenum"),
    ("hosp/labevents", "charttime"),
    ("icu/inputevents", "rateuom"),
]


@pytest.mark.parametrize(("table", "column"), REQUIRED)
def test_a_missing_column(tmp_path, table, column):
    tables = handmade.mimic4()
    tables[table] = tables[table].drop(columns=column)
    folder = write(tmp_path / "records", tables)
    refused(folder, tmp_path / "store", f"{Path(table).name}.csv.gz", column, secret=cells(tables))


@pytest.mark.parametrize("table", [*handmade.mimic4()])
def test_a_file_without_its_header(tmp_path, table):
    tables = handmade.mimic4()
    folder = write(tmp_path / "records", tables)
    tables[table].to_csv(folder / f"{table}.csv.gz", index=False, header=False)
    refused(folder, tmp_path / "store", f"{Path(table).name}.csv.gz", secret=cells(tables))


NO_NUMBER = [
    ("icu/icustays", "intime", 0),
    ("icu/icustays", "stay_id", 1),
    ("hosp/patients", "anchor_age", 1),
    ("hosp/patients", "dod", 1),
    ("hosp/admissions", "hospital_expire_flag", 0),
    ("icu/chartevents", "valuenum", 2),
    ("icu/chartevents", "itemid", 1),
    ("icu/chartevents", "charttime", 1),
    ("hosp/labevents", "valuenum", 0),
    ("icu/inputevents", "rate", 3),
    ("icu/inputevents", "patientweight", 0),
]


@pytest.mark.parametrize(
    ("table", "column", "row", "suffix"),
    [*((*case, ".csv.gz") for case in NO_NUMBER), *((*case, ".parquet") for case in NO_NUMBER[::4])],
)
def test_a_value_of_another_kind(tmp_path, table, column, row, suffix):
    tables = change(handmade.mimic4(), table, column, "SECRET word", row)
    folder = write(tmp_path / "records", tables, suffix)
    line = [f"line {row + 2}"] if suffix == ".csv.gz" else []
    secret = [*cells(tables), "SECRET"]
    refused(folder, tmp_path / "store", f"{Path(table).name}{suffix}", column, *line, secret=secret)


OTHER_TABLES = {
    "hosp/prescriptions": handmade.frame(
        "subject_id hadm_id starttime stoptime drug_type drug route",
        (71000001, 72000001, "2150-01-01 10:00:00", "2150-01-02 10:00:00", "MAIN", "Vancomycin", "IV"),
    ),
    "hosp/diagnoses_icd": handmade.frame("subject_id hadm_id icd_code icd_version", (71000001, 72000001, "4139", 9)),
    "hosp/microbiologyevents": handmade.frame(
        "subject_id micro_specimen_id chartdate charttime spec_itemid",
        (71000001, 75000001, "2150-01-01 00:00:00", "2150-01-01 10:00:00", 70012),
    ),
    "icu/outputevents": handmade.frame(
        "subject_id stay_id charttime itemid value valueuom",
        (71000001, 73000001, "2150-01-01 10:00:00", 226559, 120.25, "mL"),
    ),
    "icu/procedureevents": handmade.frame(
        "subject_id stay_id starttime endtime itemid value valueuom",
        (71000001, 73000001, "2150-01-01 10:00:00", "2150-01-01 20:00:00", 225792, 600, "min"),
    ),
}


def test_all_tables_by_hand(tmp_path):
    "The folder that the next test breaks is sound."
    got = extract(
        write(tmp_path / "records", {**handmade.mimic4(), **OTHER_TABLES}), tmp_path / "store", progress=False
    )
    assert got.events("urine").value.tolist() == [120.25] and len(got.events("culture")) == 1
    assert got.interventions("invasive_ventilation").amount.tolist() == [10]
    assert got.interventions("antibiotic").end_h.round(3).tolist() == [25.783]


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("hosp/prescriptions", "starttime"),
        ("hosp/prescriptions", "subject_id"),
        ("hosp/diagnoses_icd", "icd_version"),
        ("hosp/microbiologyevents", "chartdate"),
        ("icu/outputevents", "value"),
        ("icu/procedureevents", "endtime"),
    ],
)
def test_a_value_of_another_kind_in_the_other_tables(tmp_path, table, column):
    tables = {**handmade.mimic4(), **{n: t.copy() for n, t in OTHER_TABLES.items()}}
    change(tables, table, column, "SECRET word")
    folder = write(tmp_path / "records", tables)
    secret = [*cells(tables), "SECRET"]
    refused(folder, tmp_path / "store", f"{Path(table).name}.csv.gz", column, "line 2", secret=secret)


@pytest.mark.parametrize(
    ("tables", "table", "column", "file"),
    [
        (handmade.eicu, "patient", "unitdischargeoffset", "patient.csv.gz"),
        (handmade.eicu, "patient", "uniquepid", "patient.csv.gz"),
        (handmade.eicu, "lab", "labresultoffset", "lab.csv.gz"),
        (handmade.eicu, "infusionDrug", "patientweight", "infusionDrug.csv.gz"),
        (handmade.mimic3, "PATIENTS", "DOB", "PATIENTS.csv.gz"),
        (handmade.mimic3, "INPUTEVENTS_CV", "RATE", "INPUTEVENTS_CV.csv.gz"),
        (handmade.mimic3, "LABEVENTS", "VALUENUM", "LABEVENTS.csv.gz"),
        (handmade.tidy, "static", "age", "static.csv.gz"),
        (handmade.tidy, "static", "intime", "static.csv.gz"),
        (handmade.tidy, "events", "value", "events.csv.gz"),
        (handmade.tidy, "events", "time", "events.csv.gz"),
        (handmade.tidy, "interventions", "rate", "interventions.csv.gz"),
        (handmade.tidy, "interventions", "end", "interventions.csv.gz"),
    ],
)
def test_a_value_of_another_kind_in_the_other_sources(tmp_path, tables, table, column, file):
    made = change(tables(), table, column, "SECRET word")
    folder = write(tmp_path / "records", made)
    refused(folder, tmp_path / "store", file, column.lower(), secret=[*cells(made), "SECRET"])


def test_a_concept_that_is_unknown_or_in_the_wrong_file(tmp_path):
    made = change(handmade.tidy(), "events", "concept", "hart_rate")
    refused(
        write(tmp_path / "a", made),
        tmp_path / "store",
        "events.csv.gz",
        "hart_rate",
        "heart_rate",
        secret=cells(made)[:0],
    )
    made = change(handmade.tidy(), "events", "concept", "norepinephrine")
    refused(write(tmp_path / "b", made), tmp_path / "store", "events.csv.gz", "norepinephrine", "interventions")
    made = change(handmade.tidy(), "interventions", "concept", "heart_rate")
    refused(write(tmp_path / "c", made), tmp_path / "store", "interventions.csv.gz", "heart_rate", "events")


RECORD = "Time,Parameter,Value\n00:00,RecordID,132539\n00:00,Age,54.0625\n00:00,Gender,0\n"
RECORD += "00:00,ICUType,4\n00:07,HR,73.0625\n"
OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n132539,6,1,5.0625,-1,0\n"


def challenge(folder: Path, record: str = RECORD, outcomes: str = OUTCOMES) -> Path:
    (folder / "set-a").mkdir(parents=True)
    (folder / "set-a" / "132539.txt").write_text(record)
    (folder / "Outcomes-a.txt").write_text(outcomes)
    return folder


@pytest.mark.parametrize(
    ("record", "outcomes", "said"),
    [
        (RECORD + "00:09,HR,SECRET\n", OUTCOMES, ["132539.txt", "line 7"]),
        (RECORD + "SECRE,HR,73.0625\n", OUTCOMES, ["132539.txt", "line 7"]),
        (RECORD + "SECRET,HR,73.0625\n", OUTCOMES, ["132539.txt", "line 7"]),
        ("SECRET\n" + RECORD, OUTCOMES, ["132539.txt", "first line"]),
        (RECORD, OUTCOMES.replace("5.0625", "SECRET"), ["Outcomes-a.txt", "Length_of_stay"]),
    ],
    ids=["no number", "no time", "no time of five letters", "no header", "outcome"],
)
def test_bad_records_of_the_challenge(tmp_path, record, outcomes, said):
    good = extract(challenge(tmp_path / "good"), tmp_path / "good_store", progress=False)
    assert good.stays.age_years.tolist() == [54.0625] and good.events("heart_rate").value.tolist() == [73.0625]
    folder = challenge(tmp_path / "records", record, outcomes)
    refused(folder, tmp_path / "store", *said, secret=["SECRE", "73.0625", "54.0625", "5.0625"])


def test_a_truncated_archive_of_the_challenge(tmp_path):
    challenge(tmp_path / "records")
    folder = tmp_path / "packed"
    folder.mkdir()
    noise = "".join(f"00:{i % 60:02d},HR,{73.0625 + i}\n" for i in range(5000))
    (tmp_path / "records" / "set-a" / "132540.txt").write_text(RECORD + noise)
    archive = folder / "set-a.tar.gz"
    subprocess.run(["tar", "czf", str(archive), "-C", str(tmp_path / "records"), "set-a"], check=True)
    archive.write_bytes(archive.read_bytes()[:-2000])
    refused(folder, tmp_path / "store", "set-a.tar.gz", "truncated", "copy it again", secret=["73.0625"])


def test_stays_whose_times_run_backwards(tmp_path):
    tables = change(handmade.mimic4(), "icu/icustays", "outtime", "2149-12-31 09:17:00")
    refused(write(tmp_path / "records", tables), tmp_path / "store", "stay", "run backwards", "1", secret=cells(tables))


def test_intervals_whose_times_run_backwards(tmp_path):
    "Columns swapped: an error. One slip among many: dropped and counted."
    tables = handmade.mimic4()
    given = tables["icu/inputevents"]
    swapped = given.rename(columns={"starttime": "endtime", "endtime": "starttime"})
    made = {**tables, "icu/inputevents": swapped}
    refused(write(tmp_path / "records", made), tmp_path / "store", "inputevents", "run backwards", secret=cells(made))
    given.loc[0, "endtime"] = "2150-01-01 09:51:00"
    got = extract(write(tmp_path / "slip", tables), tmp_path / "store", progress=False)
    assert dropped(got, "norepinephrine") == {"ends before it starts": 1}
    assert len(got.interventions("norepinephrine")) == 1


def test_a_stay_without_a_patient(tmp_path):
    tables = handmade.mimic4()
    tables["hosp/patients"] = tables["hosp/patients"][:1]
    refused(write(tmp_path / "records", tables), tmp_path / "store", "stay", "without a patient", secret=cells(tables))


def test_a_stay_without_an_id_and_a_folder_in_which_no_stay_is_left(tmp_path):
    tables = change(handmade.mimic4(), "icu/icustays", "stay_id", None)
    refused(write(tmp_path / "a", tables), tmp_path / "store", "without an id", secret=cells(tables))
    tables = change(change(handmade.mimic4(), "icu/icustays", "outtime", None), "icu/icustays", "outtime", None, 1)
    refused(write(tmp_path / "b", tables), tmp_path / "store", "stays", secret=cells(tables))


def test_two_different_rows_of_one_stay(tmp_path):
    tables = handmade.mimic4()
    tables["icu/icustays"] = pd.concat([tables["icu/icustays"]] * 2, ignore_index=True)
    change(tables, "icu/icustays", "outtime", "2150-01-04 09:17:00", 2)
    refused(write(tmp_path / "records", tables), tmp_path / "store", "more than once", secret=cells(tables))


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> EventStore:
    "The store of the hand-made folder."
    folder = tmp_path_factory.mktemp("once")
    return extract(write(folder / "records", handmade.mimic4()), folder / "store", progress=False)


@pytest.mark.parametrize("table", [*handmade.mimic4()])
def test_duplicate_rows_are_kept_once_and_counted(tmp_path, once, table):
    tables = handmade.mimic4()
    tables[table] = pd.concat([tables[table]] * 2, ignore_index=True)
    twice = extract(write(tmp_path / "records", tables), tmp_path / "store", progress=False)
    for name in COLUMNS:
        assert digests(once.folder)[f"{name}.parquet"] == digests(twice.folder)[f"{name}.parquet"]
    a, b = (s.provenance["account"] for s in (once, twice))
    counted = {k: b["repeated"][k] - a["repeated"][k] for k in a["repeated"]}
    expected = {
        "icu/chartevents": ("events", 5),
        "hosp/labevents": ("events", 2),
        "icu/inputevents": ("interventions", 6),
    }
    if table in expected:
        name, n = expected[table]
        assert counted[name] == n, "each repeated row is counted"
    else:
        assert b["stays"]["repeated"] - a["stays"]["repeated"] >= 1, "repeated rows of the stays' tables are counted"


def test_an_unreadable_file(tmp_path, monkeypatch):
    "Permissions do not bind an administrator, who runs the tests in a container; so the system's refusal is played."
    tables = handmade.mimic4()
    folder = write(tmp_path / "records", tables)
    opened = gzip.open

    def no(path, *args, **kwargs):
        if "labevents" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(gzip, "open", no)
    refused(folder, tmp_path / "store", "labevents.csv.gz", "Permission denied", "permissions", secret=cells(tables))


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only an administrator can become nobody")
def test_an_unreadable_file_as_nobody():
    "The real thing: another user, whom the permissions of the file bind."
    code = """if True:
        import os, sys
        from medsim.data.sources import open_source
        from medsim.data.store import extract
        open_source(sys.argv[1] + "/records")  # Python's own modules are read before we become nobody
        os.setuid(65534)
        try: extract(sys.argv[1] + "/records", sys.argv[1] + "/out/store", progress=False)
        except ValueError as e: print(e)
        print(os.listdir(sys.argv[1] + "/out"))
    """
    with tempfile.TemporaryDirectory() as place:
        folder, out = write(Path(place, "records"), handmade.mimic4()), Path(place, "out")
        (folder / "icu" / "chartevents.csv.gz").chmod(0)
        Path(place).chmod(0o755)
        out.mkdir()
        out.chmod(0o777)
        done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True)
    said, left = done.stdout.strip().split("\n")
    assert "chartevents.csv.gz" in said and "Permission denied" in said and "permissions" in said and left == "[]"


def test_an_output_folder_that_holds_another_store(tmp_path):
    folder = write(tmp_path / "records", handmade.mimic4())
    first = extract(folder, tmp_path / "store", progress=False)
    before = digests(first.folder)
    refused(folder, tmp_path / "store", "store", "not empty", error=OutputExists)
    assert digests(first.folder) == before
    (tmp_path / "file").write_text("mine")
    refused(folder, tmp_path / "file", "file", error=OutputExists)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert digests(extract(folder, tmp_path / "empty", progress=False).folder) == before


def test_opening_what_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="no event store"):
        EventStore.open(tmp_path)
    store = extract(write(tmp_path / "records", handmade.mimic4()), tmp_path / "store", progress=False)
    (store.folder / "provenance.json").write_text(json.dumps({**store.provenance, "store_version": 99}))
    with pytest.raises(ValueError, match="99"):
        EventStore.open(store.folder)
    (store.folder / "events.parquet").unlink()
    with pytest.raises(ValueError, match="events.parquet"):
        EventStore.open(store.folder)


@pytest.mark.parametrize("place", ["O'Brien", "disk [1]", "ünïcode"])
def test_any_name_will_do_for_the_folders(tmp_path, place):
    folder = write(tmp_path / place, handmade.mimic4())
    store = extract(folder, tmp_path / place / "out" / place, progress=False)
    assert len(store.stays) == 2 and store.provenance["source"]["folder"] == place


# ---- a full disk, a Ctrl-C


@pytest.fixture
def tiny_disk(tmp_path):
    "Mount a disk of a given size."
    mounted = []

    def mount(size: str) -> Path:
        place = tmp_path / f"disk_{size}"
        place.mkdir()
        if os.name != "posix" or os.getuid() != 0 or shutil.which("mount") is None:
            pytest.skip("only an administrator can mount a small disk")
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True
        ).returncode:
            pytest.skip("mounting a small disk is not permitted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("size", ["4k", "8k", "16k", "32k"])
def test_a_full_disk_by_hand(tmp_path, tiny_disk, size):
    "The work file, then the tables: wherever the space runs out, the error says so and nothing stays."
    tables = handmade.mimic4()
    folder = write(tmp_path / "records", tables)
    refused(folder, tiny_disk(size) / "store", "space", secret=cells(tables), error=OSError)


@pytest.mark.parametrize("size", ["2m", "9m"])
def test_a_full_disk_in_the_middle_of_the_mimic_iv_demo(mimic4_demo, tiny_disk, size):
    disk = tiny_disk(size)
    refused(mimic4_demo, disk / "store", "space", error=OSError)


def test_a_write_that_fails_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    "Where no disk can be mounted: the last step finds the disk full."
    tables = handmade.mimic4()
    folder = write(tmp_path / "records", tables)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_room, "write_provenance", full)
    refused(folder, tmp_path / "store", "space", secret=cells(tables), error=OSError)
    monkeypatch.undo()
    assert len(extract(folder, tmp_path / "store", progress=False).stays) == 2


STEPS = ["run", "clean_events", "clean_intervals", "write_table", "write_provenance", "_make_stays"]


@pytest.mark.parametrize("step", STEPS)
def test_an_interruption_at_any_step_leaves_no_store(tmp_path, once, monkeypatch, step):
    folder = write(tmp_path / "records", handmade.mimic4())

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_room, step, stop)
    refused(folder, tmp_path / "store", error=KeyboardInterrupt)
    monkeypatch.undo()
    assert digests(extract(folder, tmp_path / "store", progress=False).folder) == digests(once.folder)


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
def test_ctrl_c_during_the_extraction_of_the_mimic_iv_demo(mimic4_demo, mimic4_store, tmp_path):
    "At several moments: a KeyboardInterrupt, nothing left, a clean end, and the same bytes from a second run."
    code = """if True:
        import signal, sys
        from medsim.data.store import extract
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
        print("ready", flush=True)
        try: extract(sys.argv[1], sys.argv[2], progress=False)
        except KeyboardInterrupt: print("interrupted", flush=True)
        except BaseException as e: print(type(e).__name__, e, flush=True)
        else: print("done", flush=True)
    """
    said = []
    for n, moment in enumerate((0.3, 0.8, 1.4)):
        out = tmp_path / str(n) / "store"
        out.parent.mkdir()
        command = [sys.executable, "-c", code, str(mimic4_demo), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "ready\n"
            time.sleep(moment)
            child.send_signal(signal.SIGINT)
            word, trouble = child.communicate(timeout=60)
        said.append((word.strip(), child.returncode))
        assert word.strip() in ("interrupted", "done") and child.returncode == 0, (moment, word, trouble[-500:])
        assert os.listdir(out.parent) == ([] if word.strip() == "interrupted" else ["store"])
    assert ("interrupted", 0) in said
    again = extract(mimic4_demo, tmp_path / "0" / "store", progress=False)
    assert digests(again.folder) == digests(mimic4_store.folder)
