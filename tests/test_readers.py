"Readers: known numbers come out of whole extractions, every row is accounted for, and two editions of one demo agree."

import duckdb
import handmade
import numpy as np
import pandas as pd
import pytest
from handmade import dropped, write
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medsim.data.cleaning import ASSUMED_WEIGHT_KG, KEEP_H, assign_stays, rates_to_intervals
from medsim.data.sources import FORMS, Scan, open_source
from medsim.data.store import EventStore, extract
from medsim.data.units import SPELLINGS, conversion
from medsim.data.variables import items, parse_items, vocabulary

HOUR = 3_600_000_000  # microseconds


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, EventStore]:
    "The stores of the hand-made folders."
    place = tmp_path_factory.mktemp("made")
    tables = dict(mimic4=handmade.mimic4, mimic3=handmade.mimic3, eicu=handmade.eicu, tidy=handmade.tidy)
    return {k: extract(write(place / k / "in", f()), place / k / "out", progress=False) for k, f in tables.items()}


def given_of(store: EventStore, variable: str) -> list[tuple[float, ...]]:
    rows = store.interventions(variable)[["start_h", "end_h", "rate", "amount"]].round(3)
    return [tuple(r) for r in rows.itertuples(index=False)]


# ---- numbers known beforehand, through whole extractions


def test_units_of_charted_values(made):
    assert np.allclose(made["mimic4"].events("temperature").value, 39.0, atol=1e-9)  # 102.2 degF
    assert made["mimic4"].events("fio2").value.tolist() == [60, 60]  # .6 and 60
    assert np.allclose(made["mimic3"].events("temperature").value, 39.0) and np.allclose(
        made["tidy"].events("temperature").value, 39.0
    )


def test_what_is_no_vasopressor_and_no_crystalloid(made):
    got = made["mimic4"].interventions()
    assert not got["item"].str.contains("222042").any(), "nicardipine lowers the pressure"
    assert got.variable.value_counts().to_dict() == dict(
        norepinephrine=2, vasopressin=2, crystalloid=1, blood_product=1
    )
    assert given_of(made["mimic4"], "blood_product") == [(2.633, 3.633, 350.25, 350.25)]
    assert given_of(made["mimic4"], "crystalloid") == [(1.783, 9.283, 200, 1500)]  # 1500 mL over 7.5 h


def test_vasopressin_in_units_an_hour(made):
    "2.4 units/hour and .04 units/min are the same."
    assert made["mimic4"].interventions("vasopressin").rate.round(9).tolist() == [2.4, 2.4]
    assert given_of(made["mimic3"], "vasopressin") == [(5, 9, 2.4, 9.6)]


def test_a_rate_from_the_amount(made):
    "487.5 ug over 60 min in 65.125 kg are .1248 ug/kg/min; the charted rate stands where there is one."
    assert given_of(made["mimic4"], "norepinephrine") == [(2.633, 3.633, 0.125, 7.5), (4.633, 5.633, 0.125, 7.486)]
    assert np.isclose(made["mimic4"].interventions("norepinephrine").rate[1], 487.5 / 60 / 65.125)


def test_venous_specimens_are_dropped_and_counted(made):
    for kind in ("mimic4", "mimic3"):
        kept = made[kind].events("pao2")
        assert kept.value.round().tolist() == [80] and dropped(made[kind], "pao2") == {"venous or mixed specimen": 1}


def test_draw_and_result_time(made):
    "MIMIC-IV records when a result was stored; elsewhere the vocabulary's delay is assumed, and counted."
    lactate, paO2 = made["mimic4"].events("lactate").iloc[0], made["mimic3"].events("pao2").iloc[0]
    assert np.isclose(lactate.available_h - lactate.time_h, 62 / 60)
    assert np.isclose(paO2.available_h - paO2.time_h, vocabulary().delay_h["pao2"])
    assert made["mimic4"].provenance["account"]["assumed"]["result time"] == {}
    assert made["mimic3"].provenance["account"]["assumed"]["result time"] == {"pao2": {"rows": 1}}
    tidy = made["tidy"].events("lactate").iloc[0]
    assert (tidy.time_h, tidy.available_h) == (1.5, 2.5)


def test_rewritten_orders_and_errors_of_mimic_iii(made):
    store = made["mimic3"]
    assert [r[:2] for r in given_of(store, "norepinephrine") if r[0] in (2, 4, 6)] == [(2, 3), (6, 7)]
    assert dropped(store, "norepinephrine")["order rewritten"] == 1
    assert store.events("heart_rate").value.tolist() == [80, 90]
    assert dropped(store, "heart_rate") == {"flagged as an error in the source": 1}


def test_rates_of_carevue_hold_until_the_next_charting(made):
    "Charted at 1 h and stopped at 3.5 h: one interval; a last charting holds four hours."
    rows = made["mimic3"].interventions("norepinephrine", [83000002])
    by_item = {
        i: [tuple(r) for r in g[["start_h", "end_h"]].to_numpy()] for i, g in rows.groupby("item", observed=True)
    }
    assert by_item == {"inputevents_cv:30120": [(1, 3.5)], "inputevents_cv:30047": [(1, 3), (3, 7)]}
    assert np.allclose(rows.rate, 0.1)  # 8 ug/min in 80 kg (assumed), 7 ug/min in the 70 kg charted at 2.5 h


def test_volumes_of_carevue_are_spread_over_the_hour_before(made):
    assert given_of(made["mimic3"], "blood_product") == [(3, 4, 350, 350)]
    assert all(r == (3, 4, 10, 10) or r == (3, 4, 20, 20) for r in given_of(made["mimic3"], "crystalloid"))


def test_two_bags_of_the_same_volume_are_two(made):
    "Other orders, so no row charted twice: 20 mL in all."
    assert made["mimic3"].interventions("crystalloid").amount.sum() == 20
    assert made["mimic3"].provenance["account"]["repeated"]["interventions"] == 0


def test_ages_and_deaths(made):
    old, dead = made["mimic3"].stays.iloc[1], made["mimic4"].stays.iloc[1]
    assert old.age_years == 90 and np.isclose(made["mimic3"].stays.age_years[0], 64, atol=0.01)
    assert np.isclose(dead.death_h, 49 + 10 / 60)  # deathtime, not the day after dod
    assert np.isclose(old.death_h, 27 * 24 - 10 + 24)  # only a date is known: counted from the day after
    assert made["eicu"].stays.age_years[0] == 90 and made["eicu"].stays.hospital_death[0]


def test_infusions_of_eicu(made):
    "7.75 ug/min in 77.5 kg; OFF ends it."
    assert given_of(made["eicu"], "norepinephrine") == [(1, 2, 0.1, 6)]
    assert made["eicu"].events("weight").value.tolist() == [77.5]


def test_tidy_tables_in_clock_times_and_in_hours(made):
    events, rows = made["tidy"].events(), made["tidy"].interventions()
    assert events[events.variable == "heart_rate"].time_h.tolist() == [1]
    assert rows.start_h.tolist() == [1, 1] and rows.end_h.tolist() == [3, 2] and rows.rate.tolist() == [0.1, 500]
    assert made["tidy"].stays.sex.tolist() == ["F", "M"] and made["tidy"].stays.death_h[1] == 47.5


@pytest.mark.parametrize(
    ("order_kg", "charted", "kg", "assumed"),
    [
        (65.125, [(1.0, 50.0)], 65.125, 0),  # the weight on the order
        (None, [(1.0, 50.0), (2.0, 52.0), (5.0, 90.0)], 52.0, 0),  # the last one known before it started
        (None, [(5.0, 90.0)], ASSUMED_WEIGHT_KG, 1),  # none known yet
        (3.0, [(1.0, 50.0)], 50.0, 0),  # no body weight
        (None, [], ASSUMED_WEIGHT_KG, 1),
    ],
)
def test_whose_weight(tmp_path, order_kg, charted, kg, assumed):
    tables = handmade.mimic4()
    weights = [(71000001, 73000001, f"2150-01-01 {8 + int(h):02d}:13:00", None, 224639, w, w, "kg") for h, w in charted]
    columns = tables["icu/chartevents"].columns
    tables["icu/chartevents"] = pd.DataFrame(weights, columns=columns, dtype=object)
    row = tables["icu/inputevents"].iloc[[1]].assign(patientweight=order_kg)
    tables["icu/inputevents"] = row
    store = extract(write(tmp_path / "in", tables), tmp_path / "out", progress=False)
    assert np.isclose(store.interventions("norepinephrine").rate[0], 487.5 / 60 / kg)
    expected = {"norepinephrine": {"rows": 1}} if assumed else {}
    assert store.provenance["account"]["assumed"]["weight"] == expected


# ---- every row accounted for


def numeric(*columns: str, table: str) -> pd.DataFrame:
    "Items whose rows give one number of one variable each."
    found = items(*columns, table=table)
    keep = found["item"].str.isdigit() & ~found.note.isin(["text", "mode", "present"])
    return found[keep][["item", "variable"]].astype({"item": int}).drop_duplicates()


@pytest.mark.parametrize(
    ("store", "folder", "columns"),
    [("mimic4_store", "mimic4_demo", ["mimic"]), ("mimic3_store", "mimic3_demo", ["mimic", "carevue"])],
)
def test_every_row_of_the_chart_the_laboratory_and_the_output_is_accounted_for(store, folder, columns, request):
    """Rows of interest = kept + dropped + repeated, variable by variable.

    Counted straight from the source tables. A laboratory row counts once for each stay near it, once if none is."""
    store, folder = request.getfixturevalue(store), request.getfixturevalue(folder)
    tables = open_source(folder).tables
    key = "stay_id" if tables["icustays"].has("stay_id") else "icustay_id"
    near = f"r.charttime BETWEEN i.intime - INTERVAL {KEEP_H[0]:.0f} HOUR AND i.outtime + INTERVAL {KEEP_H[1]:.0f} HOUR"
    found: dict[str, int] = {}
    with duckdb.connect() as con:
        stays = tables["icustays"].read(**{key: "BIGINT"}, subject_id="BIGINT", intime="TIMESTAMP", outtime="TIMESTAMP")
        con.execute(f"CREATE TABLE icu AS SELECT * FROM {stays}")
        for table, value in (("chartevents", "valuenum"), ("outputevents", "value"), ("labevents", "valuenum")):
            con.register("known", numeric(*(["mimic"] if table == "labevents" else columns), table=table))
            read = tables[table].read(subject_id="BIGINT", itemid="INTEGER", charttime="TIMESTAMP", **{value: "DOUBLE"})
            places = f"LEFT JOIN icu i ON r.subject_id = i.subject_id AND {near}" if table == "labevents" else ""
            text = "OR (itemid IN (223900, 723))" if table == "chartevents" else ""  # read for their words as well
            rows = con.execute(f"""SELECT variable, count(*) FROM {read} r JOIN known ON known.item = r.itemid {places}
                                   WHERE {value} IS NOT NULL {text} GROUP BY 1""").fetchall()
            for variable, n in rows:
                found[variable] = found.get(variable, 0) + n
    events = store.events(list(found))
    events = events[events["item"].str.contains("^(?:chartevents|outputevents|labevents)")]
    kept = events.variable.value_counts()
    missing = {v: n - kept[v] - sum(dropped(store, v).values()) for v, n in found.items()}
    assert len(found) > 40 and sum(found.values()) > 100_000
    assert all(n >= 0 for n in missing.values()), missing
    assert sum(missing.values()) <= store.provenance["account"]["repeated"]["events"], missing


@pytest.mark.parametrize(("store", "folder"), [("mimic4_store", "mimic4_demo"), ("mimic3_store", "mimic3_demo")])
def test_every_row_of_the_infusions_is_accounted_for(store, folder, request):
    store, folder = request.getfixturevalue(store), request.getfixturevalue(folder)
    tables = open_source(folder).tables
    found: dict[str, int] = {}
    with duckdb.connect() as con:
        for table, column in (("inputevents", "mimic"), ("inputevents_mv", "mimic"), ("inputevents_cv", "carevue")):
            if table not in tables:
                continue
            known = numeric(column, table="inputevents_cv" if column == "carevue" else "inputevents")
            con.register("known", known.merge(vocabulary().group.rename("kind"), left_on="variable", right_index=True))
            where, types = "true", {}
            if column == "carevue":
                types = dict(amount="DOUBLE", rate="DOUBLE", stopped="VARCHAR")
                drug = "rate IS NOT NULL OR stopped IN ('Stopped', 'D/C''d')"
                where = f"CASE kind WHEN 'fluid' THEN amount > 0 ELSE {drug} END"
            rows = con.execute(f"""SELECT variable, count(*) FROM {tables[table].read(itemid="INTEGER", **types)} r
                                   JOIN known ON known.item = r.itemid WHERE {where} GROUP BY 1""").fetchall()
            for variable, n in rows:
                found[variable] = found.get(variable, 0) + n
    kept = store.interventions(list(found)).variable.value_counts()
    missing = {v: n - kept.get(v, 0) - sum(dropped(store, v).values()) for v, n in found.items()}
    assert len(found) >= 10 and all(n >= 0 for n in missing.values()), missing
    assert sum(missing.values()) <= store.provenance["account"]["repeated"]["interventions"], missing


# ---- the table of data/README.md: stays with at least one value in the MIMIC-IV demo


def stays_with(frame: pd.DataFrame, *items: str) -> int:
    return frame[frame["item"].isin(items)].stay_id.nunique() if items else frame.stay_id.nunique()


def test_stays_with_a_value_in_the_mimic_iv_demo(mimic4_store):
    s = mimic4_store
    assert stays_with(s.events("spo2")) == 140
    assert stays_with(s.events("pao2"), "chartevents:220224") == 74
    assert stays_with(s.events(["gcs_eye", "gcs_verbal", "gcs_motor"])) == 140
    assert stays_with(s.events("urine")) == 137
    assert s.stays.hospital_death.sum() == 20 and len(s.stays) == 140
    agents = dict(norepinephrine=33, phenylephrine=33, vasopressin=9, dopamine=5, epinephrine=4)
    assert {a: stays_with(s.interventions(a)) for a in agents} == agents
    assert stays_with(s.interventions(list(agents))) == 52


def test_stays_with_an_oxygen_fraction_in_the_mimic_iv_demo(mimic4_store):
    "75 by the chart; the store has 77, because it also reads the fraction noted with a blood gas (item 50816)."
    assert stays_with(mimic4_store.events("fio2"), "chartevents:223835") == 75
    assert stays_with(mimic4_store.events("fio2")) == 77


@pytest.fixture(scope="module")
def mimic4_labs(mimic4_demo):
    "Stays with a number of a laboratory item drawn between so many hours before admission and after discharge."
    tables = open_source(mimic4_demo).tables
    labs = tables["labevents"].read(subject_id="BIGINT", itemid="INTEGER", charttime="TIMESTAMP", valuenum="DOUBLE")
    icu = tables["icustays"].read(stay_id="BIGINT", subject_id="BIGINT", intime="TIMESTAMP", outtime="TIMESTAMP")

    def count(item: int, before_h: int, after_h: int) -> int:
        with duckdb.connect() as con:
            return con.execute(f"""SELECT count(DISTINCT stay_id) FROM {labs} l JOIN {icu} i
                ON l.subject_id = i.subject_id AND charttime >= intime - INTERVAL {before_h} HOUR
                AND charttime <= outtime + INTERVAL {after_h} HOUR
                WHERE itemid = {item} AND valuenum IS NOT NULL""").fetchall()[0][0]

    return count


@pytest.mark.parametrize(
    ("variable", "item", "published", "stored", "within"),
    [("lactate", 50813, 109, 113, 92), ("bilirubin_total", 50885, 78, 98, 65)],
)
def test_stays_with_a_laboratory_value_in_the_mimic_iv_demo(
    mimic4_store, mimic4_labs, variable, item, published, stored, within
):
    """The published counts are of values drawn from six hours before admission to discharge, for the same patient.

    The store keeps values from 72 h before to 24 h after the stay (a last value is carried forward, and a suspected
    infection reaches back), so it has more stays with one: 113 with a lactate, 98 with a bilirubin. Drawn inside the
    stay alone they are 92 and 65. Both rules are reproduced straight from the source tables; cut to the published
    window, the store gives the published counts."""
    assert mimic4_labs(item, 6, 0) == published
    assert mimic4_labs(item, 0, 0) == within
    assert mimic4_labs(item, int(KEEP_H[0]), int(KEEP_H[1])) == stored
    events = mimic4_store.events(variable)
    events = events[events["item"] == f"labevents:{item}"]
    assert stays_with(events) == stored
    out = mimic4_store.stays.set_index("stay_id").out_h.reindex(events.stay_id).to_numpy()
    assert stays_with(events[(events.time_h >= -6) & (events.time_h <= out)]) == published


# ---- properties


WORD = st.text("abcXYZ_9 .+-|#()%", min_size=1, max_size=8).map(str.strip).filter(bool)
TABLE = st.text("abcxyz_", min_size=1, max_size=6)


@given(st.lists(st.tuples(st.one_of(st.just(""), TABLE), WORD, st.one_of(st.just(""), WORD)), max_size=6))
def test_a_source_cell_reads_as_it_was_written(entries):
    cell = "; ".join((f"{t}:" if t else "") + i + (f"@{n}" if n else "") for t, i, n in entries)
    assert parse_items(cell) == entries


@given(st.text(max_size=60))
def test_any_cell_is_read_or_refused(cell):
    try:
        found = parse_items(cell)
    except ValueError as e:
        assert "table:item" in str(e)
    else:
        assert all(item for _, item, _ in found)


UNITS = sorted(SPELLINGS) + [
    f"{q}{kg}/{t}" for q in ("ng", "ug", "mcg", "mg") for kg in ("", "/kg") for t in ("min", "h")
]
UNITS += ["units/h", "units/min", "mL/h", "L/h"]


@given(
    st.sampled_from(sorted(vocabulary().index)),
    st.sampled_from(UNITS),
    st.sampled_from(UNITS),
    st.floats(0.01, 1e4),
    st.floats(20, 400),
)
@settings(max_examples=400)
def test_a_conversion_and_its_inverse(variable, a, b, value, kg):
    try:
        there, back = conversion(variable, a, b), conversion(variable, b, a)
    except ValueError as e:
        assert variable in str(e) and repr(a) in str(e) or repr(b) in str(e)
        assume(False)
    assert np.isclose(back(there(value, kg), kg), value, rtol=1e-9)


SPELLED = [(unit, spelling) for unit, all_ in SPELLINGS.items() for spelling in all_.split()]


@given(st.sampled_from(SPELLED), st.sampled_from([str.upper, str.title, str.lower]), st.floats(0.1, 1e3))
def test_a_unit_in_any_spelling_is_the_same(pair, case, value):
    unit, spelling = pair
    assert conversion("heart_rate", case(spelling.replace("_", " ")), unit)(value) == value


TYPES = {c: kind or "INTEGER" for c, kind in FORMS["rates"].items()}


def load(con: duckdb.DuckDBPyConnection, name: str, rows: list[tuple], types: dict[str, str]) -> None:
    con.execute(f"CREATE OR REPLACE TABLE {name} ({', '.join(f'{c} {t}' for c, t in types.items())})")
    if rows:
        con.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(types))})", rows)


charted = st.tuples(
    st.sampled_from([1, 2]), st.integers(0, 30), st.sampled_from([7, 8]), st.one_of(st.none(), st.integers(0, 3))
)


@given(st.lists(charted, max_size=25), st.sampled_from([1.0, 4.0, 12.0]), st.sampled_from([0.5, 1.0]))
@settings(max_examples=40)
def test_rates_charted_at_moments_never_overlap_and_never_hold_too_long(rows, hold_h, spread_h):
    """A rate where the last number is given, else a volume.

    No charting is lost: of two rates at one moment the lower one is there with its reason, to be counted."""
    raw = []
    for stay, half, item, rate in rows:
        dose = dict(rate=rate, rate_unit="ug/min") if rate is not None else dict(amount=50.0, amount_unit="mL")
        raw.append(dict(subject_id=1, stay_id=stay, t=half * HOUR // 2, item=item, order_id=len(raw), **dose))
    scan = Scan("t", "rates", "", "carevue", "t", options=dict(hold_h=hold_h, spread_h=spread_h))
    with duckdb.connect() as con:
        load(con, "raw", [tuple(r.get(c) for c in TYPES) for r in raw], TYPES)
        got = con.execute(f"SELECT * FROM {rates_to_intervals('raw', scan)}").df()
    assert sorted(got.order_id) == [r["order_id"] for r in raw]
    volumes, rates = got[got.amount.notna()], got[got.amount.isna() & got.excluded.isna()]
    assert volumes.excluded.isna().all() and (volumes.t1 - volumes.t0 == spread_h * HOUR).all()
    assert ((rates.t1 - rates.t0 > 0) & (rates.t1 - rates.t0 <= hold_h * HOUR)).all()
    for _, one in rates.sort_values("t0").groupby(["stay_id", "item"]):
        assert (one.t1.to_numpy()[:-1] <= one.t0.to_numpy()[1:]).all()
    highest: dict[tuple, float] = {}
    for r in raw:
        if r.get("rate") is not None:
            key = (r["stay_id"], r["item"], r["t"])
            highest[key] = max(r["rate"], highest.get(key, 0))
    assert {(r.stay_id, r.item, r.t0): r.rate for r in rates.itertuples()} == highest and len(rates) == len(highest)


STAYS = dict(stay_id="BIGINT", subject_id="BIGINT", in_us="BIGINT", out_us="BIGINT")
EVENT = dict(subject_id="BIGINT", stay_id="BIGINT", t="BIGINT", row="BIGINT")
stay = st.tuples(st.sampled_from([1, 2]), st.integers(0, 500), st.integers(1, 100))
event = st.tuples(st.sampled_from([1, 2, 3]), st.integers(-150, 700), st.booleans())


@given(st.lists(stay, min_size=1, max_size=5), st.lists(event, min_size=1, max_size=15), st.randoms())
@settings(max_examples=40)
def test_each_charted_row_has_at_most_one_stay(stays, events, random):
    "A row of the chart is in one stay or none, a row of the hospital in every stay of the patient near it."
    placed = [
        (100 + n, subject, start * HOUR, (start + length) * HOUR) for n, (subject, start, length) in enumerate(stays)
    ]
    raw = []
    for n, (subject, hour, named) in enumerate(events):
        own = [p[0] for p in placed if p[1] == subject]
        raw.append((subject, random.choice(own) if named and own else None, hour * HOUR, n))
    before, after = (int(h * HOUR) for h in KEEP_H)
    near = {
        (row, p[0])
        for subject, _, t, row in raw
        for p in placed
        if p[1] == subject and p[2] - before <= t <= p[3] + after
    }
    with duckdb.connect() as con:
        load(con, "stays", placed, STAYS)
        load(con, "raw", raw, EVENT)
        charted, drawn = (
            con.execute(f"SELECT row, stay_id FROM ({assign_stays(con, 'raw', 't', hospital)})").fetchall()
            for hospital in (False, True)
        )
    assert sorted(row for row, _ in charted) == [r[3] for r in raw], "each row once"
    assert {pair for pair in charted if pair[1] is not None} <= near
    found = dict(charted)
    for subject, named, _, row in raw:
        if named is not None:
            assert found[row] in (named, None) and (found[row] is None) == ((row, named) not in near)
        else:
            assert (found[row] is None) == (not any(r == row for r, _ in near)), (subject, row)
    assert {pair for pair in drawn if pair[1] is not None} == near
    assert sorted({row for row, _ in drawn}) == [r[3] for r in raw]
