"Tables of the benchmark from made-up courses."

import numpy as np
import pandas as pd
import pytest

from medsim.bench.figures import draw_by_patient
from medsim.bench.tables import KEYS, findings, shown, summary


def courses(effect_model: float = 1.0, effect_timing: float = 0.5, patients: int = 12) -> pd.DataFrame:
    "Two models x two timings, two courses a patient; individual and adaptive are better by known amounts."
    rng, rows = np.random.default_rng(0), []
    base = rng.normal(8, 1, patients)
    for timing in ("fixed", "adaptive"):
        for model in ("population", "individual"):
            level = base - effect_model * (model == "individual") - effect_timing * (timing == "adaptive")
            for course in (-0.1, 0.1):
                rows.append(pd.DataFrame({"patient": np.arange(patients), "severity": level + course, "timing": timing,
                                          "model": model, "severity_end": 5.0, "safe": 0.8, "safe_late": 0.9,
                                          "violated": np.arange(patients) % 2 == 0}))
    return pd.concat(rows, ignore_index=True).assign(method="PPO", budget=10)


def test_known_effects():
    made = courses()
    table = summary(made, n_boot=100)
    mean = made.groupby(["timing", "model"]).severity.mean()
    best = table.loc[("PPO", "adaptive", 10, "individual")]
    assert best["PopInd %"].value == pytest.approx(100 / mean["adaptive", "population"])
    assert best["FixAdap %"].value == pytest.approx(50 / mean["fixed", "individual"])
    assert best["PopInd wins"].value == 1 and best["violated"].value == 0.5
    assert table.loc[("PPO", "fixed", 10, "population")][["PopInd %", "FixAdap %"]].isna().all()
    assert tuple(table.index.names) == KEYS and len(table) == 4
    assert best["severity"].n == 12  # patients, not courses


def test_nothing_to_compare_with():
    table = summary(courses().query("model == 'individual' and timing == 'adaptive'"), n_boot=50)
    assert len(table) == 1 and "PopInd %" not in table and "FixAdap %" not in table


def test_text_and_picture():
    text = shown(summary(courses(), n_boot=50))
    assert text.loc[("PPO", "fixed", 10, "population"), "PopInd %"] == ""
    assert text["Safe %"].str.startswith("80.00 [").all()
    ax = draw_by_patient(courses(), "PPO", "timing")
    assert "fixed" in ax.get_xlabel() and len(ax.collections) == 2


def test_other_frames_are_refused():
    with pytest.raises(ValueError, match="lacks the columns budget"): summary(courses().drop(columns="budget"))


def with_limit(severity: float, safe: float) -> pd.DataFrame:
    "PPO and a PPO-Lag that differs from it by as much, for everybody alike."
    made = courses()
    other = made.assign(method="PPO-Lag", severity=made.severity + severity, safe=made.safe + safe)
    return pd.concat([made, other], ignore_index=True)


@pytest.mark.parametrize(("severity", "safe", "safer", "lower_is_not"), [
    (1.0, 0.1, "yes", "yes"), (1.0, -0.1, "the reverse", "the reverse"), (-1.0, 0.1, "yes", "the reverse"),
    (-1.0, -0.1, "the reverse", "yes"), (0.0, 0.1, "yes", "not seen"), (1.0, 0.0, "not seen", "not seen"),
])
def test_the_claims_say_what_the_differences_are(severity, safe, safer, lower_is_not):
    found = findings(with_limit(severity, safe)).groupby("claim").says.agg(set)
    assert found["Lagrangian is safer"] == {safer} and found["lower SOFA is not safer"] == {lower_is_not}
    assert found["adaptive beats fixed"] == found["individual beats population"] == {"yes"}


def test_claims_without_anything_to_compare():
    alone = courses().query("model == 'individual' and timing == 'adaptive'")
    assert findings(alone).empty
