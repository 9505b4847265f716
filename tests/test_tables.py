"Tables: names, types and rows come back whatever the form of the file, and a bad file is told without quoting it."

import gzip
import traceback
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsim.data.sources import find_tables
from medsim.data.tables import Job, SourceError, Table, count_rows, explaining, run, table_name

ROWS = {  # data/README.md of the shared demos
    "mimic3": {
        "chartevents": 758_355,
        "labevents": 76_074,
        "inputevents_mv": 13_224,
        "inputevents_cv": 34_799,
        "outputevents": 11_320,
    },
    "mimic4": {
        "chartevents": 668_862,
        "labevents": 107_727,
        "inputevents": 20_404,
        "outputevents": 9_362,
        "procedureevents": 1_468,
    },
}
LABS = 'Subject_ID,ItemID,ValueNum,Comment\n71000001,50813,2.0625,"arm, right"\n71000002,50813,,\n'
SECRETS = ("71000001", "71000002", "2.0625", "arm, right", "SECRET")


def counts(folder: Path, names: dict[str, int]) -> dict[str, int]:
    found = find_tables(folder)
    with duckdb.connect() as con:
        return {n: count_rows(con, Table.open(found[n])) for n in names}


def test_row_counts_of_the_mimic_iii_demo(mimic3_demo):
    assert counts(mimic3_demo, ROWS["mimic3"]) == ROWS["mimic3"]


def test_row_counts_of_the_mimic_iv_demo(mimic4_demo):
    assert counts(mimic4_demo, ROWS["mimic4"]) == ROWS["mimic4"]


def read(table: Table, optional=None, /, **required) -> pd.DataFrame:
    with duckdb.connect() as con:
        return con.execute(f"SELECT * FROM {table.read(optional, **required)}").df()


def saved(folder: Path, form: str) -> Path:
    if form == "csv":
        (folder / "LABS.csv").write_text(LABS)
    elif form == "windows":
        (folder / "LABS.csv").write_bytes(b"\xef\xbb\xbf" + LABS.replace("\n", "\r\n").encode())
    elif form == "gzip":
        (folder / "Labs.CSV.gz").write_bytes(gzip.compress(LABS.encode()))
    else:
        (folder / "labs.csv").write_text(LABS)
        pd.read_csv(folder / "labs.csv", dtype=str).to_parquet(folder / "labs.parquet")
        (folder / "labs.csv").unlink()
    return next(folder.iterdir())


@pytest.mark.parametrize("form", ["csv", "windows", "gzip", "parquet"])
def test_the_same_rows_from_every_form(tmp_path, form):
    table = Table.open(saved(tmp_path, form))
    got = read(table, {"storetime": "TIMESTAMP"}, subject_id="BIGINT", valuenum="DOUBLE", comment="VARCHAR")
    assert table.name == "labs" and table.has("VALUENUM") and not table.has("storetime")
    assert got.columns.tolist() == ["subject_id", "valuenum", "comment", "storetime"]
    assert got.subject_id.tolist() == [71000001, 71000002] and got.valuenum[0] == 2.0625 and pd.isna(got.valuenum[1])
    assert got.comment[0] == "arm, right" and got.storetime.isna().all()
    with duckdb.connect() as con:
        assert count_rows(con, table) == 2


def test_names_that_are_words_of_sql(tmp_path):
    (tmp_path / "given.csv").write_text("start,end,order,group\n1,2,3,4\n")
    got = read(Table.open(tmp_path / "given.csv"), start="DOUBLE", end="DOUBLE", order="DOUBLE", group="DOUBLE")
    assert got.iloc[0].tolist() == [1, 2, 3, 4]


@given(st.sampled_from([".parquet", ".csv", ".csv.gz"]), st.text("abcXYZ_19", min_size=1, max_size=12))
def test_a_table_is_named_by_its_file(suffix, name):
    assert table_name(Path("icu") / (name + suffix)) == name.lower()
    assert table_name(Path(name + suffix.upper())) == name.lower() and table_name(Path(name + ".txt")) is None


def refused(action, *said: str) -> None:
    with pytest.raises(SourceError) as caught:
        action()
    text, trace = str(caught.value), "".join(traceback.format_exception(caught.value))
    for word in said:
        assert word in text, f"{word!r} is not in: {text}"
    for secret in SECRETS:
        assert secret not in text and secret not in trace


def scan(file: Path, **types: str) -> None:
    table = Table.open(file)
    with duckdb.connect() as con:
        run(con, [Job(f"CREATE TABLE x AS SELECT * FROM {table.read(**types)}", table)])


def test_a_missing_column_names_file_and_column(tmp_path):
    (tmp_path / "labs.csv").write_text(LABS)
    refused(
        lambda: Table.open(tmp_path / "labs.csv").read(storetime="TIMESTAMP"), "labs.csv", "storetime", "Subject_ID"
    )


@pytest.mark.parametrize(
    ("column", "kind", "said"),
    [("valuenum", "DOUBLE", "number"), ("itemid", "INTEGER", "whole number"), ("subject_id", "TIMESTAMP", "time")],
)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_a_value_of_another_type_names_file_column_and_line(tmp_path, suffix, column, kind, said):
    labs = pd.DataFrame(dict(subject_id=["71000001", "71000002"], itemid="50813", valuenum="2.0625", note="disk, gzip"))
    labs.loc[1, column] = "SECRET"
    if kind == "TIMESTAMP":
        labs.loc[0, column] = "2150-01-01 09:41:00"
    file = tmp_path / f"labs{suffix}"
    labs.to_parquet(file) if suffix == ".parquet" else labs.to_csv(file, index=False)
    line = () if suffix == ".parquet" else ("line 3",)
    refused(lambda: scan(file, **{column: kind}), file.name, column, said, *line)


@pytest.mark.parametrize("place", ["disk1", "no space left", "gzip", "O'Brien", "mimic[1]"])
def test_the_name_of_a_folder_changes_neither_result_nor_error(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir()
    (folder / "labs.csv").write_text(LABS)
    with duckdb.connect() as con:
        assert count_rows(con, Table.open(folder / "labs.csv")) == 2
    (folder / "bad.csv").write_text("subject_id,valuenum\n71000001,SECRET\n")
    refused(lambda: scan(folder / "bad.csv", valuenum="DOUBLE"), "bad.csv", "line 2", "valuenum", "number")


def packed(text: str) -> bytes:
    return gzip.compress(text.encode())


LONG = "subject_id,valuenum\n" + "".join(f"{71000001 + i},{i * 0.37:.6f}\n" for i in range(50_000))


@pytest.mark.parametrize("part", [0.001, 0.3, 0.7, 0.95])
def test_a_truncated_gzip(tmp_path, part):
    whole = packed(LONG)
    (tmp_path / "labs.csv.gz").write_bytes(whole[: int(len(whole) * part)])
    refused(lambda: scan(tmp_path / "labs.csv.gz", valuenum="DOUBLE"), "labs.csv.gz", "truncated", "copy it again")


@pytest.mark.parametrize("at", [0.0, 0.001, 0.5])
def test_a_damaged_gzip(tmp_path, at):
    whole = bytearray(packed(LONG))
    for i in range(int(len(whole) * at), int(len(whole) * at) + 30):
        whole[i] ^= 0xA5
    (tmp_path / "labs.csv.gz").write_bytes(whole)
    refused(lambda: scan(tmp_path / "labs.csv.gz", valuenum="DOUBLE"), "labs.csv.gz")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("71000001,50813,2.0625,SECRET\n71000002,50813,2.0625,SECRET\n", "header"),
        ("71000001,F,6417,2150,\n", "header"),
        ("subject_id,valuenum,ValueNum\n71000001,2.0625,2.0625\n", "twice"),
    ],
    ids=["empty", "no header", "no header, a sex", "a column twice"],
)
def test_a_file_without_a_proper_header(tmp_path, content, said):
    (tmp_path / "labs.csv").write_text(content)
    refused(lambda: scan(tmp_path / "labs.csv", subject_id="BIGINT"), "labs.csv", said)


def test_a_file_without_a_header_shows_no_cell_of_its_first_row(tmp_path):
    "Even where a cell, such as a sex, could be the name of a column."
    (tmp_path / "patients.csv").write_text("71000001,SECRET,64,2150,\n")
    refused(lambda: Table.open(tmp_path / "patients.csv").read(subject_id="BIGINT"), "patients.csv")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("71000001", "line 3"),
        ('71000001,"SECRET', "line 3"),
        ("71000001,2,SECRET,SECRET", "line 3"),
        ("71000001,\udcff\udcfe", "bad.csv"),
    ],
    ids=["too short", "open quote", "too long", "no UTF-8"],
)
def test_a_line_that_is_no_csv(tmp_path, line, said):
    text = f"subject_id,note\n71000001,fine\n{line}\n" + "71000002,fine\n" * 3
    (tmp_path / "bad.csv").write_bytes(text.encode(errors="surrogateescape"))
    refused(lambda: scan(tmp_path / "bad.csv", subject_id="BIGINT", note="VARCHAR"), "bad.csv", said)


def test_something_else_under_the_name_of_a_table(tmp_path):
    (tmp_path / "labs.csv.gz").write_bytes(b"SECRET words, not packed")
    (tmp_path / "labs.parquet").write_bytes(b"SECRET words, no Parquet")
    for name in ("labs.csv.gz", "labs.parquet"):
        refused(lambda name=name: Table.open(tmp_path / name), name, "copy it again")


def test_an_unreadable_file(tmp_path, monkeypatch):
    "Permissions do not bind an administrator, who runs the tests in a container; so the system's refusal is played."
    (tmp_path / "labs.csv").write_text(LABS)

    def no(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", no)
    refused(lambda: Table.open(tmp_path / "labs.csv"), "labs.csv", "Permission denied", "permissions")


def test_jobs_run_side_by_side_and_the_first_failure_is_told(tmp_path):
    (tmp_path / "labs.csv").write_text(LABS)
    table = Table.open(tmp_path / "labs.csv")
    with duckdb.connect() as con:
        run(con, [Job(f"CREATE TABLE t{i} AS SELECT {i} AS i", table) for i in range(5)], progress=True)
        assert sum(con.execute(f"SELECT i FROM t{i}").fetchall()[0][0] for i in range(5)) == 10
        jobs = [Job(f"CREATE TABLE u{i} AS SELECT {i}", table) for i in range(3)]
        bad = Job(f"CREATE TABLE u AS SELECT CAST(comment AS DOUBLE) FROM {table.read(comment='VARCHAR')}", table)
        refused(lambda: run(con, [*jobs, bad]), "labs.csv")


def test_explaining_leaves_other_errors_alone():
    with pytest.raises(KeyError), explaining():
        raise KeyError("other")
    with duckdb.connect() as con, pytest.raises(SourceError) as caught, explaining():
        con.execute("SELECT CAST('SECRET' AS DOUBLE)")
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
