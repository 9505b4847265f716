"Sources: what a folder is, what it lacks and what that costs, and a clear refusal where it is nothing we know."

import gzip
import shutil
import subprocess
from pathlib import Path

import handmade
import pandas as pd
import pytest

from medsim.data.sources import KINDS, find_tables, meds_shards, open_source
from medsim.data.tables import SourceError

MADE = {"mimic4": handmade.mimic4, "mimic3": handmade.mimic3, "tidy": handmade.tidy, "eicu": handmade.eicu}


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
@pytest.mark.parametrize("kind", MADE)
def test_a_hand_made_folder_is_recognised_in_every_form(tmp_path, kind, suffix):
    source = open_source(handmade.write(tmp_path / "records", MADE[kind](), suffix))
    assert source.kind == kind and source.label == KINDS[kind].label
    assert set(KINDS[kind].required) <= set(source.tables)


@pytest.mark.parametrize("kind", MADE)
def test_the_case_of_names_does_not_matter(tmp_path, kind):
    def shout(t: pd.DataFrame) -> pd.DataFrame:
        return t.rename(columns=str.swapcase)

    swapped = {name.swapcase(): shout(t) for name, t in MADE[kind]().items()}
    source = open_source(handmade.write(tmp_path / "records", swapped))
    assert source.kind == kind and len(source.tables) == len(swapped)


def test_meds_and_the_challenge_are_recognised(tmp_path):
    shard = tmp_path / "meds" / "data" / "train"
    shard.mkdir(parents=True)
    row = dict(subject_id=[1], time=pd.to_datetime(["2150-01-01"]), code=["ICU_ADMISSION//MICU"], numeric_value=[1.0])
    pd.DataFrame(row).to_parquet(shard / "0.parquet")
    assert open_source(tmp_path / "meds").kind == "meds" and len(meds_shards(tmp_path / "meds")) == 1
    records = tmp_path / "challenge" / "set-a"
    records.mkdir(parents=True)
    (records / "132539.txt").write_text("Time,Parameter,Value\n00:00,RecordID,132539\n")
    assert open_source(tmp_path / "challenge").kind == "challenge2012"
    subprocess.run(
        ["tar", "czf", str(tmp_path / "set-a.tar.gz"), "-C", str(tmp_path / "challenge"), "set-a"], check=True
    )
    assert open_source(tmp_path / "set-a.tar.gz").kind == "challenge2012"
    shutil.rmtree(tmp_path / "challenge")
    assert open_source(tmp_path).kind == "challenge2012"  # a folder that holds the archive


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("mimic4_demo", "mimic4"),
        ("mimic3_demo", "mimic3"),
        ("eicu_demo", "eicu"),
        ("meds_demo", "meds"),
        ("challenge2012", "challenge2012"),
    ],
)
def test_the_demos_are_recognised_as_open_data(folder, kind, request):
    source = open_source(request.getfixturevalue(folder))
    assert source.kind == kind
    assert source.open_data, "a demo is open data (ODbL or ODC-By) and may be shown"


def test_what_the_demos_lack(mimic4_demo, mimic3_demo, eicu_demo):
    assert open_source(mimic4_demo).missing == {} and open_source(mimic3_demo).missing == {}
    assert set(open_source(eicu_demo).missing) == {"nursecharting"}


@pytest.mark.parametrize(
    ("licence", "open_data"),
    [
        ("## ODC Open Database License (ODbL)\n", True),
        ("Open Data Commons Open Database License v1.0", True),
        ("A synthetic cohort: no real patient is in it.", True),
        ("PhysioNet Credentialed Health Data License 1.5.0", False),
        ("", False),
    ],
)
def test_open_data_is_told_by_its_licence(tmp_path, licence, open_data):
    "Credentialed data must never pass for open: what is shown of it depends on this."
    folder = handmade.write(tmp_path / "records", handmade.mimic4())
    (folder / "LICENSE.txt").write_text(licence)
    assert open_source(folder).open_data is open_data


def test_a_missing_table_is_named_with_its_cost(tmp_path):
    source = open_source(handmade.write(tmp_path / "records", handmade.mimic4()))
    assert set(source.missing) == {
        "outputevents",
        "procedureevents",
        "microbiologyevents",
        "prescriptions",
        "diagnoses_icd",
    }
    assert "Sepsis-3 onset cannot be computed" in source.missing["microbiologyevents"]
    assert "no microbiologyevents: no cultures: Sepsis-3 onset cannot be computed" in str(source)
    for table, cost in source.missing.items():
        assert table in str(source) and cost and str(tmp_path) not in str(source)


@pytest.mark.parametrize("kind", ["mimic4", "mimic3", "tidy"])
def test_a_missing_required_table_is_an_error(tmp_path, kind):
    for n, table in enumerate(t for t in MADE[kind]() if Path(t).name.lower() in KINDS[kind].required):
        tables = MADE[kind]()
        del tables[table]
        folder = handmade.write(tmp_path / str(n), tables)
        with pytest.raises(SourceError) as caught:
            open_source(folder)
        assert Path(table).name.lower() in str(caught.value)


def test_a_table_there_twice_is_read_once_the_best_form_first(tmp_path):
    tables = handmade.mimic4()
    for suffix in (".csv", ".csv.gz", ".parquet"):
        handmade.write(tmp_path, tables, suffix)
    found = find_tables(tmp_path)
    assert len(found) == len(tables) and {p.suffix for p in found.values()} == {".parquet"}


def test_files_that_are_no_tables_are_left_alone(tmp_path):
    folder = handmade.write(tmp_path / "records", handmade.mimic4())
    (folder / "notes.docx").write_bytes(b"\x00")
    (folder / "icu" / "._chartevents.csv.gz").write_bytes(b"\x00")  # what a Mac leaves behind
    source = open_source(folder)
    assert source.tables["chartevents"].path.name == "chartevents.csv.gz"


def refused(path: Path, *said: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(path)
    for word in said:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_no_folder_and_no_known_layout(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    (tmp_path / "file.csv").write_text("a,b\n1,2\n")
    refused(tmp_path / "file.csv", "file.csv", "not a folder")
    refused(tmp_path, "unknown layout", "file", "MIMIC-IV", "eICU", "MEDS", "Challenge")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "unknown layout", "none")


def test_a_key_column_that_tells_the_kind_is_missing(tmp_path):
    tables = handmade.mimic4()
    tables["icu/icustays"] = tables["icu/icustays"].drop(columns="stay_id")
    refused(handmade.write(tmp_path / "records", tables), "icustays", "stay_id", "icustay_id")


def test_a_broken_archive(tmp_path):
    (tmp_path / "set-a.tar.gz").write_bytes(gzip.compress(b"no archive")[:-4])
    refused(tmp_path / "set-a.tar.gz", "set-a.tar.gz", "archive")
