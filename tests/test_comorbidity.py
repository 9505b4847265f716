"Elixhauser categories and score: hand-written expectations, properties, and faults."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.core.paths import data_folder
from medsim.data.comorbidity import (
    categories,
    clean_codes,
    codes_before,
    elixhauser_history,
    elixhauser_score,
    elixhauser_table,
    split_eicu_codes,
    weigh,
)

TABLE = elixhauser_table()

# ICD version, code, categories; what the codes say is in the comment. Written by hand from the printed table.
EXPECTED = [
    (9, "428.0", "congestive_heart_failure"),  # heart failure
    (9, "398.91", "congestive_heart_failure"),  # rheumatic heart failure
    (9, "427.31", "cardiac_arrhythmias"),  # atrial fibrillation
    (9, "427.5", ""),  # cardiac arrest
    (9, "426.11", ""),  # first degree block
    (9, "424.1", "valvular_disease"),
    (9, "415.19", "pulmonary_circulation"),  # embolism
    (9, "416.8", "pulmonary_circulation chronic_pulmonary"),  # other chronic pulmonary heart disease
    (9, "440.20", "peripheral_vascular"),
    (9, "447.1", "peripheral_vascular"),  # the misprint of the paper
    (9, "401.9", "hypertension_uncomplicated"),
    (9, "403.91", "hypertension_complicated renal_failure"),
    (9, "404.93", "congestive_heart_failure hypertension_complicated renal_failure"),
    (9, "342.90", "paralysis"),
    (9, "334.1", "paralysis other_neurological"),  # hereditary spastic paraplegia
    (9, "345.90", "other_neurological"),  # epilepsy
    (9, "496", "chronic_pulmonary"),  # COPD
    (9, "250.00", "diabetes_uncomplicated"),
    (9, "250.60", "diabetes_complicated"),
    (9, "244.9", "hypothyroidism"),
    (9, "585.6", "renal_failure"),
    (9, "584.9", ""),  # acute kidney failure is no comorbidity
    (9, "V45.11", "renal_failure"),  # dialysis
    (9, "070.54", "liver_disease"),  # hepatitis C
    (9, "571.2", "liver_disease alcohol_abuse"),  # alcoholic cirrhosis
    (9, "531.90", "peptic_ulcer"),
    (9, "531.40", ""),  # bleeding ulcer
    (9, "042", "hiv_aids"),
    (9, "202.80", "lymphoma"),
    (9, "197.7", "metastatic_cancer"),
    (9, "162.9", "solid_tumour"),
    (9, "173.9", ""),  # skin cancer other than melanoma
    (9, "714.0", "rheumatoid_collagen"),
    (9, "286.9", "coagulopathy"),
    (9, "287.5", "coagulopathy"),
    (9, "278.01", "obesity"),
    (9, "261", "weight_loss"),
    (9, "276.1", "fluid_electrolyte"),
    (9, "280.0", "blood_loss_anaemia"),
    (9, "280.9", "deficiency_anaemia"),
    (9, "285.1", ""),  # acute blood loss anaemia is not in the lists
    (9, "303.90", "alcohol_abuse"),
    (9, "305.1", ""),  # smoking
    (9, "304.00", "drug_abuse"),
    (9, "295.30", "psychoses"),
    (9, "296.54", "psychoses depression"),
    (9, "311", "depression"),
    (9, "038.9", ""),  # septicaemia
    (9, "E878.8", ""),  # external cause, not a fluid disorder
    (10, "I50.9", "congestive_heart_failure"),
    (10, "I13.0", "congestive_heart_failure hypertension_complicated"),
    (10, "I42.6", "congestive_heart_failure alcohol_abuse"),  # alcoholic cardiomyopathy
    (10, "I48.91", "cardiac_arrhythmias"),
    (10, "I46.9", ""),  # cardiac arrest
    (10, "I35.0", "valvular_disease"),
    (10, "I27.81", "pulmonary_circulation chronic_pulmonary"),
    (10, "I26.99", "pulmonary_circulation"),
    (10, "I70.209", "peripheral_vascular"),
    (10, "I10", "hypertension_uncomplicated"),
    (10, "I12.0", "hypertension_complicated renal_failure"),
    (10, "G81.90", "paralysis"),
    (10, "G40.909", "other_neurological"),
    (10, "J44.1", "chronic_pulmonary"),
    (10, "E11.9", "diabetes_uncomplicated"),
    (10, "E11.65", "diabetes_complicated"),
    (10, "E03.9", "hypothyroidism"),
    (10, "N18.6", "renal_failure"),
    (10, "N17.9", ""),  # acute kidney failure
    (10, "K74.60", "liver_disease"),
    (10, "K70.30", "liver_disease alcohol_abuse"),
    (10, "K25.9", "peptic_ulcer"),
    (10, "B20", "hiv_aids"),
    (10, "C83.30", "lymphoma"),
    (10, "C78.7", "metastatic_cancer"),
    (10, "C34.90", "solid_tumour"),
    (10, "M06.9", "rheumatoid_collagen"),
    (10, "D69.6", "coagulopathy"),
    (10, "E66.01", "obesity"),
    (10, "E43", "weight_loss"),
    (10, "E87.1", "fluid_electrolyte"),
    (10, "D50.0", "blood_loss_anaemia"),
    (10, "D50.9", "deficiency_anaemia"),
    (10, "F10.20", "alcohol_abuse"),
    (10, "F11.20", "drug_abuse"),
    (10, "F17.210", ""),  # smoking
    (10, "F25.9", "psychoses"),
    (10, "F32.9", "depression"),
    (10, "F31.5", "psychoses depression"),
    (10, "A41.9", ""),  # sepsis
    (10, "V45.1", ""),  # a car and a train, not dialysis
]

# Pairs that share a printed code; everything else must be disjoint.
SHARED = {
    9: {
        ("congestive_heart_failure", "hypertension_complicated"),
        ("congestive_heart_failure", "renal_failure"),
        ("congestive_heart_failure", "alcohol_abuse"),
        ("pulmonary_circulation", "chronic_pulmonary"),
        ("hypertension_complicated", "renal_failure"),
        ("paralysis", "other_neurological"),
        ("liver_disease", "alcohol_abuse"),
        ("psychoses", "depression"),
    },
}
SHARED[10] = SHARED[9] - {("congestive_heart_failure", "renal_failure")}


@pytest.mark.parametrize(("version", "code", "wanted"), EXPECTED)
def test_known_code(version, code, wanted):
    for text in (code, code.replace(".", ""), f" {code.lower()} "):
        flags = categories(pd.Series([text]), version).iloc[0]
        assert set(flags.index[flags]) == set(wanted.split())


def test_every_category_has_an_expected_code_in_both_versions():
    for version in (9, 10):
        named = {k for v, _, wanted in EXPECTED if v == version for k in wanted.split()}
        assert named == set(TABLE.index)


def test_weights():
    "Van Walraven et al. 2009, all categories that are not 0."
    points = dict(
        congestive_heart_failure=7, cardiac_arrhythmias=5, valvular_disease=-1, pulmonary_circulation=4,
        peripheral_vascular=2, paralysis=7, other_neurological=6, chronic_pulmonary=3, renal_failure=5,
        liver_disease=11, lymphoma=9, metastatic_cancer=12, solid_tumour=4, coagulopathy=3, obesity=-4,
        weight_loss=6, fluid_electrolyte=5, blood_loss_anaemia=-2, deficiency_anaemia=-2, drug_abuse=-7,
        depression=-3,
    )  # fmt: skip
    assert TABLE.weight[TABLE.weight != 0].to_dict() == points
    assert TABLE.superseded_by.dropna().isin(TABLE.index).all()


@pytest.mark.parametrize(("version", "column"), [(9, "icd9"), (10, "icd10")])
def test_lists_are_disjoint_where_they_should_be(version, column):
    found = set()
    for i, a in enumerate(TABLE.index):
        for b in TABLE.index[i + 1 :]:
            pa, pb = TABLE.loc[a, column], TABLE.loc[b, column]
            if any(x.startswith(y) or y.startswith(x) for x in pa for y in pb):
                found.add((a, b))
    assert found == SHARED[version]


@pytest.mark.parametrize(("column", "shape"), [("icd9", r"(\d{3}|V\d{2})\d{0,2}"), ("icd10", r"[A-TZ]\d{2}\d?")])
def test_prefixes_are_of_their_version(column, shape):
    for prefixes in TABLE[column]:
        assert len(prefixes) == len(set(prefixes)) > 0
        assert pd.Series(prefixes).str.fullmatch(shape).all()
        assert not any(a != b and a.startswith(b) for a in prefixes for b in prefixes)  # none is idle


CODES = st.sampled_from([(c, v) for v, c, _ in EXPECTED])
ROWS = st.lists(st.tuples(st.integers(0, 4), CODES), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_order_and_duplicates_do_not_matter(rows, random):
    frame = pd.DataFrame([(i, c, v) for i, (c, v) in rows], columns=["id", "code", "version"])
    shuffled = rows + random.choices(rows, k=len(rows))
    random.shuffle(shuffled)
    other = pd.DataFrame([(i, c, v) for i, (c, v) in shuffled], columns=["id", "code", "version"])
    pd.testing.assert_series_equal(elixhauser_score(frame), elixhauser_score(other))


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_history_ends_at_the_score(rows):
    frame = pd.DataFrame([(i, c, v) for i, (c, v) in rows], columns=["id", "code", "version"])
    frame["time_h"] = np.random.default_rng(len(rows)).uniform(-5, 50, len(frame)).round(1)
    history = elixhauser_history(frame)
    last = history.groupby("id").elixhauser.last()
    pd.testing.assert_series_equal(last, elixhauser_score(frame))
    changed = history.groupby("id").elixhauser.diff().ne(0)
    assert changed.all()


def test_hierarchy():
    def score(*codes):
        return int(weigh(categories(pd.Series(codes), 9).any().to_frame().T).iloc[0])

    assert score("162.9") == 4 and score("197.7") == 12 and score("162.9", "197.7") == 12
    assert score("250.00", "250.60") == 0 and score("401.9", "402.90") == 0


def test_index_missing_and_versions():
    codes = pd.Series(["4280", None, "I509"], index=[7, 7, 3])
    version = pd.Series(["9", None, "10"], index=codes.index)
    flags = categories(codes, version)
    assert flags.index.tolist() == [7, 7, 3]
    assert flags.congestive_heart_failure.tolist() == [True, False, True] and flags.to_numpy().sum() == 2
    assert categories(codes, pd.Series([9, pd.NA, 10], dtype="Int64", index=codes.index)).equals(flags)


def test_no_rows():
    empty = pd.DataFrame({"id": [1], "code": ["4280"], "version": [9]}).iloc[:0]
    assert elixhauser_score(empty).empty
    assert elixhauser_history(empty.assign(time_h=pd.Series(dtype=float))).empty
    assert split_eicu_codes(pd.Series([None, ""], dtype=object)).empty


def test_faults():
    with pytest.raises(ValueError, match="drops leading zeros"):
        clean_codes(pd.Series([4280]))
    with pytest.raises(ValueError, match="neither 9 nor 10"):
        categories(pd.Series(["4280"]), 8)
    with pytest.raises(ValueError, match="neither 9 nor 10"):
        categories(pd.Series(["4280"]), pd.Series([None]))
    with pytest.raises(ValueError, match="version"):
        elixhauser_score(pd.DataFrame({"id": [1], "code": ["4280"]}))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("428.0, I50.9", [("4280", 9), ("I509", 10)]),
        ("980.0, E980.2, T51.0", [("9800", 9), ("E9802", 9), ("T510", 10)]),
        ("969.4, E980.2, T42.4X", [("9694", 9), ("E9802", 9), ("T424X", 10)]),
        ("31.1", []),  # a procedure (tracheostomy); without its dot it would be depression
        ("518.81, 31.1", [("51881", 9)]),
        ("V08, Z21", [("V08", 9), ("Z21", 10)]),
        ("486, 486, J18.9", [("486", 9), ("486", 9), ("J189", 10)]),
        ("276.8, E87.6", [("2768", 9), ("E876", 10)]),
        ("291.81, F10.239", [("29181", 9), ("F10239", 10)]),
        ("038.9; r65.20", [("0389", 9), ("R6520", 10)]),
        ("not a code", []),
    ],
)
def test_split_eicu(text, wanted):
    split = split_eicu_codes(pd.Series([text]))
    assert list(zip(split.code, split.version, strict=True)) == wanted


def test_codes_before_is_strict_and_keeps_patients_apart():
    index = pd.DataFrame(dict(id=[1, 2], subject_id=[10, 20], time=[5.0, 5.0]))
    coded = pd.DataFrame(
        dict(subject_id=[10, 10, 10, 20, 10], known=[4.0, 5.0, 6.0, 1.0, np.nan], code=list("abcde"), version=9)
    )
    assert codes_before(index, coded)[["id", "code"]].values.tolist() == [[1, "a"], [2, "d"]]


@pytest.mark.skipif(data_folder("mimic-iv-demo") is None, reason="MEDSIM_DATA holds no mimic-iv-demo")
def test_mimic_demo():
    "Reading the codes as numbers fails loudly; as text every stay is scored within the possible range."
    path = data_folder("mimic-iv-demo") / "hosp/diagnoses_icd.csv.gz"
    icd = pd.read_csv(path, dtype={"icd_code": str})
    frame = icd.rename(columns=dict(hadm_id="id", icd_code="code", icd_version="version"))
    score = elixhauser_score(frame)
    assert len(score) == 275 and score.between(-19, 89).all()
    old = frame[frame.version == 9]
    assert not categories(old.code, old.version).equals(categories(old.code, 10))
