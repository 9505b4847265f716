"Antibiotic names, routes and items: hand-written expectations, properties, and real drug lists where at hand."

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.core.paths import data_folder
from medsim.data.antibiotics import (
    antibiotic_class,
    antibiotic_generic,
    antibiotic_items,
    antibiotic_table,
    exclusion,
    exclusion_rules,
    fill_names,
    is_antibiotic,
    is_antibiotic_treatment,
    name_items,
)

TABLE = antibiotic_table()

# text, generic, class
NAMED = [
    ("Vancomycin", "vancomycin", "glycopeptide"),
    ("VANCOMYCIN HCL IN DEXTROSE 1 GM/200ML IV SOLN", "vancomycin", "glycopeptide"),
    ("Piperacillin-Tazobactam Na", "piperacillin-tazobactam", "penicillin + inhibitor"),
    ("PIPERACILLIN SOD-TAZOBACTAM SO 3-0.375 G IV SOLR", "piperacillin-tazobactam", "penicillin + inhibitor"),
    ("Zosyn (ml/hr)", "piperacillin-tazobactam", "penicillin + inhibitor"),
    ("Piperacillin", "piperacillin", "penicillin"),
    ("Ampicillin-Sulbactam", "ampicillin-sulbactam", "penicillin + inhibitor"),
    ("Ampicillin Sodium", "ampicillin", "penicillin"),
    ("Amoxicillin-Clavulanic Acid", "amoxicillin-clavulanate", "penicillin + inhibitor"),
    ("Amoxicillin", "amoxicillin", "penicillin"),
    ("Penicillin G Potassium", "penicillin", "penicillin"),
    ("Dicloxacillin", "dicloxacillin", "penicillin"),
    ("Nafcillin", "nafcillin", "penicillin"),
    ("*NF* Ertapenem Sodium", "ertapenem", "carbapenem"),
    ("Imipenem/Cilastatin", "imipenem-cilastatin", "carbapenem"),
    ("MERREM", "meropenem", "carbapenem"),
    ("Meropenem-vaborbactam", "meropenem-vaborbactam", "carbapenem"),
    ("CeftazIDIME", "ceftazidime", "cephalosporin 3rd"),
    ("ceftazidime/avibactam", "ceftazidime-avibactam", "cephalosporin 3rd"),
    ("Ceftolozane-Tazobactam", "ceftolozane-tazobactam", "cephalosporin 5th"),
    ("1 EACH VIAL : CEFEPIME HCL 1 GM IJ SOLR", "cefepime", "cephalosporin 4th"),
    ("20 ML SYRINGE : CEFAZOLIN 2 G IN STERILE WATER 20 ML SYRINGE IV", "cefazolin", "cephalosporin 1st"),
    ("Keflex", "cephalexin", "cephalosporin 1st"),
    ("Cefpodoxime Proxetil", "cefpodoxime", "cephalosporin 3rd"),
    ("Aztreonam", "aztreonam", "monobactam"),
    ("Gentamicin Sulfate", "gentamicin", "aminoglycoside"),
    ("Tobramycin", "tobramycin", "aminoglycoside"),
    ("AZITHromycin 500 mg in NS 250 mL IV", "azithromycin", "macrolide"),
    ("Erythromycin", "erythromycin", "macrolide"),
    ("Clindamycin Suspension", "clindamycin", "lincosamide"),
    ("Doxycycline Hyclate", "doxycycline", "tetracycline"),
    ("Tigecycline", "tigecycline", "tetracycline"),
    ("LEVOFLOXACIN IN D5W 750 MG/150ML IV SOLN", "levofloxacin", "fluoroquinolone"),
    ("Ciprofloxacin IV", "ciprofloxacin", "fluoroquinolone"),
    ("moxifloxacin", "moxifloxacin", "fluoroquinolone"),
    ("MetRONIDAZOLE (FLagyl)", "metronidazole", "nitroimidazole"),
    ("Sulfameth/Trimethoprim DS", "trimethoprim-sulfamethoxazole", "sulfonamide"),
    ("Bactrim (SMX/TMP)", "trimethoprim-sulfamethoxazole", "sulfonamide"),
    ("Trimethoprim", "trimethoprim", "sulfonamide"),
    ("Linezolid", "linezolid", "oxazolidinone"),
    ("Daptomycin", "daptomycin", "lipopeptide"),
    ("Rifampin", "rifampin", "rifamycin"),
    ("Colistin", "colistin", "polymyxin"),
    ("Nitrofurantoin Monohyd (MacroBID)", "nitrofurantoin", "nitrofuran"),
    ("Dalfopristin/Quinupristin (Synercid)", "quinupristin-dalfopristin", "streptogramin"),
    ("MEDICATION//CefTRIAXone//Administered", "ceftriaxone", "cephalosporin 3rd"),
    ("infectious diseases|medications|therapeutic antibacterials|carbapenem|meropenem", "meropenem", "carbapenem"),
]

NOT_ANTIBACTERIAL = [
    "Fluconazole", "Voriconazole", "Micafungin", "Ambisome", "Acyclovir", "Ganciclovir", "Oseltamivir", "Isoniazid",
    "Ethambutol HCl", "Pyrazinamide", "Dapsone", "Atovaquone Suspension", "Pentamidine-Inhalation", "Rifaximin",
    "Penicillamine", "Mitomycin", "Bleomycin", "DAUNOrubicin", "DOXOrubicin", "Pantoprazole", "Omeprazole",
    "Methimazole", "SulfaSALAzine_", "Ferrous Sulfate", "Magnesium Sulfate", "Levothyroxine", "LevETIRAcetam",
    "Mupirocin Ointment 2%", "Clotrimazole Cream", "Minoxidil", "Epoetin Alfa", "Demeclocycline", "Methenamine",
    "Doxazosin", "Doxercalciferol", "Levophed-k",
]  # fmt: skip

LOCAL = [  # drug, route
    ("Ciprofloxacin 0.3% Ophth Soln", None),
    ("Gentamicin 0.3% Ophth. Soln", None),
    ("Erythromycin 0.5% Ophth Oint", "OU"),
    ("Erythromycin", "OS"),
    ("moxifloxacin", "BOTH EYES"),
    ("ciprofloxacin", "RT EYE"),
    ("Ofloxacin", "LEFT EAR"),
    ("Ciprofloxacin-Dexamethasone Otic", "LEFT EAR"),
    ("Bacitracin/Polymyxin B Sulfate Opht. Oint", "RIGHT EYE"),
    ("Neomycin-Polymyxin-Bacitracin", "TP"),
    ("Metronidazole", "VG"),
    ("Metronidazole Gel 0.75%-Vaginal", None),
    ("Clindamycin 1% Topical Lotion", None),
    ("Silver Sulfadiazine 1% Cream", "TP"),
    ("Tobramycin Inhalation Soln", "IH"),
    ("Tobramycin", "NEBULIZER"),
    ("Polymyxin B", "IRR"),
    ("cefazolin", "Irrigation"),
    ("Vancomycin Antibiotic Lock", "IV"),
    ("Gentamicin", "DWELL"),
    ("Vancomycin Oral Liquid", None),
    ("Vancomycin Enema", "PR"),
    ("Vancomycin", "PO/NG"),
    ("VANCOCIN", "NG Tube"),
    ("vancomycin", "JTUBE"),
    ("Vancomycin", "09-Antibiotics (Non IV)"),
    ("Gentamicin", "PO"),
    ("CeftriaXONE (Desensitization)", "IV"),
    ("Ampicillin Graded Challenge", "IV"),
    ("VANCOMYCIN CONSULT TO PHARMACY", "See Instruct"),
    ("Vancomycin trough level", None),
    ("Ceftazidime", "NU"),
]

SYSTEMIC = [
    ("Vancomycin", "IV"),
    ("Vancomycin", None),
    ("VANCOmycin 1 GM in NS 250 mL IVPB", "IVPB"),
    ("vancomycin", "INTRAVENOU"),
    ("Vancomycin", "08-Antibiotics (IV)"),
    ("Vancomycin", "DIALYS"),
    ("Vancomycin", "IT"),
    ("cefepime", "IV Catheter"),
    ("Metronidazole", "PO/NG"),
    ("Ciprofloxacin HCl", "09-Antibiotics (Non IV)"),
    ("Amoxicillin-Clavulanic Acid", "NASOGASTRI"),
    ("Clindamycin Suspension", "ORAL"),
    ("Gentamicin", "IM"),
    ("LEVOFLOXACIN 750 MG PO TABS", "PO"),
    ("100 ML  -  METRONIDAZOLE IN NACL 5-0.79 MG/ML-% IV SOLN", "IV"),
]


def test_named():
    texts, generics, classes = map(list, zip(*NAMED, strict=True))
    names = pd.Series(texts)
    assert antibiotic_generic(names).tolist() == generics
    assert antibiotic_class(names).tolist() == classes
    assert is_antibiotic(names).all()


def test_not_antibacterial():
    names = pd.Series(NOT_ANTIBACTERIAL)
    found = antibiotic_generic(names)
    assert found.isna().all(), names[found.notna()].tolist()


@pytest.mark.parametrize(("orders", "wanted"), [(LOCAL, False), (SYSTEMIC, True)])
def test_routes(orders, wanted):
    frame = pd.DataFrame(orders, columns=["drug", "route"])
    verdict = is_antibiotic(frame.drug, frame.route)
    assert (verdict == wanted).all(), frame[verdict != wanted].values.tolist()
    assert antibiotic_generic(frame.drug).notna().all()


def test_tables():
    assert TABLE.pattern.is_unique and TABLE.notna().all(axis=None)
    assert (TABLE.pattern == TABLE.pattern.str.lower()).all()
    # every generic name finds itself, whatever stands above it in the table
    generics = pd.Series(TABLE.generic.unique())
    assert antibiotic_generic(generics).tolist() == generics.tolist()
    # every pattern is reachable: it finds its own drug
    assert antibiotic_generic(TABLE.pattern).tolist() == TABLE.generic.tolist()
    rules = exclusion_rules()
    assert rules["where"].isin(["drug", "route"]).all() and rules.applies.isin(["all", "gut_only"]).all()
    items = antibiotic_items()
    assert items.generic.isin(TABLE.generic).all() and not items.duplicated(["source", "code"]).any()


def test_tables_are_copies():
    mine = antibiotic_table()
    mine["generic"] = "x"
    assert antibiotic_table().equals(TABLE)


ORDERS = [(d, r) for d, r in LOCAL + SYSTEMIC] + [(n, None) for n in NOT_ANTIBACTERIAL] + [(None, "IV")]


def judge(rows, case=None):
    frame = pd.DataFrame(rows, columns=["drug", "route"], dtype="object")
    return is_antibiotic(frame.drug.map(case, na_action="ignore") if case else frame.drug, frame.route)


ALONE = {row: bool(judge([row]).iloc[0]) for row in ORDERS}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(ORDERS), max_size=25), st.sampled_from([None, str.upper, str.lower, str.title]))
def test_each_row_is_judged_alone_and_case_does_not_matter(rows, case):
    verdict = judge(rows, case)
    assert verdict.tolist() == [ALONE[row] for row in rows] and verdict.dtype == bool


def test_a_route_only_takes_away():
    frame = pd.DataFrame(ORDERS, columns=["drug", "route"]).iloc[::-1]
    with_route, without = is_antibiotic(frame.drug, frame.route), is_antibiotic(frame.drug)
    assert with_route.index.equals(frame.index) and not (with_route & ~without).any()
    assert (with_route == (antibiotic_generic(frame.drug).notna() & exclusion(frame.drug, frame.route).isna())).all()


def test_treatments():
    wanted = {
        "infectious diseases|medications|therapeutic antibacterials": True,
        "infectious diseases|medications|therapeutic antibacterials|vancomycin": True,
        "pulmonary|medications|antibacterials|quinolone|levofloxacin": True,
        "renal|medications|systemic antibiotics": True,
        "surgery|infection|therapeutic antibacterials|penicillins|piperacillin/tazobactam": True,
        "gastrointestinal|medications|antibiotics|metronidazole": True,
        "gastrointestinal|medications|antibiotics|vancomycin": False,
        "infectious diseases|medications|prophylactic antibacterials|for surgery|vancomycin": False,
        "infectious diseases|medications|antifungal therapy|fluconazole": False,
        "infectious diseases|medications|anti-protozoal therapy|for malaria|doxycycline": False,
        "burns/trauma|burns|topical burn preparation|silver sulfadiazine": False,
        None: False,
    }
    assert is_antibiotic_treatment(pd.Series(list(wanted), dtype="object")).tolist() == list(wanted.values())


def test_items():
    codes = pd.Series([225798, 225893, 225899, 227691, 221906, 225837, None])
    drugs = ["vancomycin", "piperacillin-tazobactam", "trimethoprim-sulfamethoxazole", "cephalexin", "-", "-", "-"]
    assert name_items(codes, "metavision").fillna("-").tolist() == drugs
    assert name_items(pd.Series(["225798"]), "hicl").isna().all()
    with pytest.raises(ValueError, match="carevue"):
        name_items(codes, "carevue")


def test_fill_names():
    names = pd.Series(["Zosyn", None, None, None, "aspirin", None], index=list("abcdef"))
    numbers = pd.Series([5, 5, 8738, -1, 4042, 4042], index=names.index)
    filled = fill_names(names, numbers)
    zosyn = "piperacillin-tazobactam"
    assert filled.fillna("-").tolist() == ["Zosyn", zosyn, zosyn, "-", "aspirin", "-"]
    assert fill_names(names, numbers * 0).isna().sum() == names.isna().sum()


def test_faults():
    with pytest.raises(ValueError, match="do not share an index"):
        is_antibiotic(pd.Series(["Vancomycin", "Zosyn"]), pd.Series(["IV"]))


@pytest.mark.skipif(data_folder("mimic-iv-demo") is None, reason="MEDSIM_DATA holds no mimic-iv-demo")
def test_dictionary_of_mimic():
    "The name and the item table agree on every item of the category, and on no other input."
    d = pd.read_csv(data_folder("mimic-iv-demo") / "icu/d_items.csv.gz").query("linksto == 'inputevents'")
    by_item = name_items(d.itemid, "metavision")
    assert by_item.notna().sum() == 37
    listed = d.category == "Antibiotics"
    assert antibiotic_generic(d.label[listed]).fillna("-").tolist() == by_item[listed].fillna("-").tolist()
    assert by_item[~listed].isna().all()


@pytest.mark.skipif(data_folder("eicu-demo") is None, reason="MEDSIM_DATA holds no eicu-demo")
def test_named_rows_of_eicu_agree_with_the_numbers():
    rx = pd.read_csv(data_folder("eicu-demo") / "medication.csv.gz", usecols=["drugname", "drughiclseqno"])
    number = name_items(rx.drughiclseqno, "hicl")
    both = rx.drugname.notna() & number.notna()
    assert both.sum() > 900 and antibiotic_generic(rx.drugname[both]).equals(number[both])
