"Safety flags and subgroups: counts made by hand, imputed values, unknown features, hidden counts, real stays."

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.data.actions import Continuous, SepsisGrid, Treatments, VentilationGrid
from medsim.data.arrays import last_step
from medsim.data.cohorts import sepsis3
from medsim.data.episodes import Episodes
from medsim.data.normaliser import Normaliser
from medsim.data.timeline import decision_steps
from medsim.ope.estimate import COLUMNS, evaluate
from medsim.ope.safety import (
    SEPSIS_FLAGS,
    Factor,
    Flag,
    dose_map,
    draw_flags,
    flagged,
    group_of,
    hidden_groups,
    judged,
    jumps,
    levels,
    most,
    none,
    offence,
    probabilities,
    reading,
    safety_flags,
    share_of,
    subgroups,
)

GRID = SepsisGrid((0.05, 0.1, 0.2), (100.0, 250.0, 500.0))
STOPPED, UNTREATED, FLOOD, HIGH, SHOCK, OWN, DONE = SEPSIS_FLAGS


def made(rows: dict[str, list[list[float]]], done: list[list[tuple[int, int]]], *, flags=("lactate",), subject=None,
         spec=GRID, ids=None, low=None, high=None) -> Episodes:
    "Episodes of values {feature: rows, NaN where not measured} and (vasopressor, fluid) levels."
    names = [n for name in rows for n in ([name, f"{name}_missing"] if name in flags else [name])]
    n, t = len(done), max(map(len, done))
    values, action, mask = np.full((n, t, len(names)), np.nan), np.zeros((n, t), int), np.zeros((n, t), bool)
    for i, pairs in enumerate(done):
        mask[i, : len(pairs)], action[i, : len(pairs)] = True, [5 * v + f for v, f in pairs]
        for name, x in rows.items(): values[i, : len(pairs), names.index(name)] = x[i]
    for name in flags: values[..., names.index(f"{name}_missing")] = np.isnan(values[..., names.index(name)])
    unit = Normaliser.fit(values, names, mask, low, high)
    zero, subject = np.zeros((n, t)), np.arange(n) if subject is None else subject
    base = pd.DataFrame({"stay_id": np.arange(n), "subject_id": subject, "start_h": 0.0, "fold": "test"})
    return Episodes(
        obs=unit.transform(values), action=action, reward=zero, cost=zero, dt=zero + 4.0, mask=mask, normaliser=unit,
        terminated=last_step(mask), truncated=zero > 0, ids=base.assign(**(ids or {})), action_spec=spec,
        final_obs=unit.transform(values[:, 0]), feature_names=tuple(names), units=dict.fromkeys(names, ""),
        alignment={}, behaviour_prob=np.full((n, t), 0.2),
    )


FEW = made(
    {"map": [[50, 54, 60, 55], [95, 91], [60, 60, 90]], "pf_ratio": [[140, 150, 149, 300], [300, 100], [300] * 3],
     "lactate": [[5, 5, 5, 3], [3, 3], [np.nan, 4.1, np.nan]]},
    [[(2, 1), (0, 0), (0, 0), (4, 4)], [(4, 0), (1, 4)], [(0, 0), (3, 0), (0, 0)]], subject=[1, 2, 2],
)


def always(action: int, e: Episodes = FEW) -> np.ndarray:
    return np.broadcast_to(np.eye(e.action_spec.n)[action], (*e.mask.shape, e.action_spec.n))


def table(policy, e: Episodes = FEW, flags=SEPSIS_FLAGS, **how) -> pd.DataFrame:
    return safety_flags(e, policy, flags, **{"against": {}, "open_data": True, "n_boot": 20, **how})


def some(n: int = 60, t: int = 5, seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    sick = {"map": rng.normal(60, 15, (n, t)), "pf_ratio": rng.uniform(80, 400, (n, t)),
            "lactate": np.where(rng.random((n, t)) < 0.3, np.nan, rng.uniform(1, 9, (n, t)))}
    length = rng.integers(1, t + 1, n)
    done = [[tuple(x) for x in rng.integers(0, 5, (k, 2))] for k in length]
    died = rng.random(n) < 0.5
    ids = {"died": pd.array(died, dtype="boolean"), "age_years": rng.integers(20, 95, n).astype(float),
           "sex": rng.choice(["F", "M"], n)}
    return made({k: [x[i, : length[i]] for i in range(n)] for k, x in sick.items()}, done, ids=ids)


SOME = some()


def softmax(e: Episodes, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(e.action_spec.n, 0.2), e.mask.shape)


# ---- counts by hand


def test_what_was_done_counted_by_hand():
    t = table(None)
    assert t.at_risk.tolist() == [1, 2, 3, 2, 4, 6, 6] and t.flagged.tolist() == [1, 1, 1, 1, 2, 4, 4]
    assert t.patients.tolist() == [1, 1, 2, 1, 2, 2, 2] and t.undecided.tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert t["of"].tolist() == ["pairs of steps"] + ["steps"] * 4 + ["pairs of steps"] * 2
    assert np.allclose(t.share, t.flagged / t.at_risk.astype(float))


def test_fixed_policies_by_hand():
    "Before were (2,1), (0,0), (0,0), (4,0), (0,0), (3,0): two jumps to nothing, six to the most of both."
    nothing, flood = table(always(0)), table(always(24))
    assert nothing.flagged.tolist() == [1, 2, 0, 0, 4, 0, 2] and flood.flagged.tolist() == [0, 0, 3, 2, 0, 0, 6]
    assert (nothing.at_risk == flood.at_risk).all()


def test_mass_of_a_mixture_is_the_mixture_of_masses():
    mixed, a, b = table(0.25 * always(0) + 0.75 * always(24)), table(always(0)), table(always(24))
    linear = [0, 1, 2, 3, 4, 6]  # not the jump from its own choice, which is a product
    assert np.allclose(mixed.flagged[linear], (0.25 * a.flagged + 0.75 * b.flagged)[linear])
    assert mixed.share[5] == pytest.approx(2 * 0.25 * 0.75)


def test_own_jump_is_the_product_over_both_choices():
    e, p = SOME, softmax(SOME, 1)
    at, _ = judged(OWN, e)
    v, f = GRID.decode(np.arange(25))
    far = (abs(v[:, None] - v) >= 3) | (abs(f[:, None] - f) >= 3)
    i, t = np.argwhere(at)[7]
    by_hand = sum(p[i, t - 1, a] * p[i, t, b] for a in range(25) for b in range(25) if far[a, b])
    assert flagged(OWN, p, e, at)[i, t] == pytest.approx(by_hand) and not at[:, 0].any()


def test_patients_are_the_unit():
    "Every stay twice as the same patients: twice the steps, the same interval."
    p = softmax(SOME, 2)
    twice = SOME.select(np.tile(np.arange(len(SOME)), 2))
    once, both = table(p, SOME, n_boot=200), table(np.concatenate([p, p]), twice, n_boot=200)
    assert (both.at_risk == 2 * once.at_risk).all() and (both.patients == once.patients).all()
    pd.testing.assert_frame_equal(once[["share", "ci_low", "ci_high"]], both[["share", "ci_low", "ci_high"]])


# ---- properties


@settings(max_examples=12)
@given(st.integers(0, 10_000))
def test_shares_are_shares_and_greedy_is_mass_for_choices(seed):
    e = some(15, 4, seed)
    p = softmax(e, seed)
    t = table(p, e)
    seen = t[t.patients > 0]
    assert seen.share.between(0, 1).all() and (seen.flagged <= seen.at_risk + 1e-9).all()
    assert (seen.ci_low <= seen.share + 1e-9).all() and (seen.share <= seen.ci_high + 1e-9).all()
    assert (t.at_risk + t.undecided <= e.mask.sum()).all()
    greedy = table(p, e, choice="greedy")
    chosen = table(np.eye(25)[p.argmax(-1)], e)
    pd.testing.assert_frame_equal(greedy, chosen)
    pd.testing.assert_frame_equal(table(np.eye(25)[e.action], e), table(None, e))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=8))
def test_no_small_count_can_be_subtracted(ends):
    counts = np.array([(died + lived, died, lived) for died, lived in ends])
    hide, small = hidden_groups(counts), (counts < 10).any(1)
    assert hide[small].all() and (small.any() or not hide.any())
    if hide.any() and not hide.all(): assert hide.sum() >= 2 and (counts[hide].sum(0) >= (20, 10, 10)).all()


# ---- forms of policies and grids


class Actor:
    "A policy that can only be asked for log-probabilities."

    logits = torch.tensor(np.random.default_rng(3).normal(size=(4, 25)))

    def log_prob(self, obs, action):
        rows = torch.log_softmax(obs.double()[:, :1] * self.logits[:1] + self.logits[1], -1)
        return rows[torch.arange(len(obs)), action]


def test_an_object_is_asked_for_every_action():
    p = probabilities(Actor(), FEW)
    assert np.allclose(p[FEW.mask].sum(-1), 1)
    pd.testing.assert_frame_equal(table(Actor()), table(p))


def test_any_grid():
    spec = Treatments(("fluids", "vasopressor"), ("mL", "ug"), (0, 0), (500, 10), ((0, 250, 500), (0, 5, 10)))
    assert {k: v.tolist() for k, v in levels(spec).items()} == {
        "fluid": [0, 0, 0, 1, 1, 1, 2, 2, 2], "vasopressor": [0, 1, 2] * 3}
    assert offence(HIGH, spec).tolist() == [0, 0, 1] * 3 and offence(FLOOD, spec).sum() == 3
    assert offence(OWN, spec).sum() == 0  # three levels cannot differ by three
    above = Treatments(("insulin",), ("U",), (0,), (4,), ((1, 4),))
    assert levels(above)["insulin"].tolist() == [1, 2]
    e = replace(FEW, action_spec=spec, action=np.where(FEW.mask, FEW.action % 9, 0))
    assert table(always(2, e), e).flagged[3] == 2
    vent = replace(FEW, action_spec=VentilationGrid(), action=np.where(FEW.mask, FEW.action % 18, 0))
    assert table(None, vent).note.str.startswith("not known: needs drug").all()


def test_tied_quartiles_keep_their_top_bin():
    tied = SepsisGrid((0.1, 0.1, 0.1), (100.0, 100.0, 100.0))
    assert levels(tied)["vasopressor"].max() == 4 and offence(HIGH, tied).sum() == 5


# ---- what is not known


def test_imputed_values_are_not_at_risk():
    rows = {"map": [[50, 50]], "lactate": [[8, np.nan]]}
    seen, blind = made(rows, [[(0, 0), (0, 0)]]), made(rows, [[(0, 0), (0, 0)]], flags=())
    a, b = table(None, seen, (SHOCK,)), table(None, blind, (SHOCK,))
    assert (a.at_risk[0], a.undecided[0], b.at_risk[0], b.undecided[0]) == (1, 1, 2, 0)
    assert "lactate measured" in a.note[0] and "lactate as given, imputed or not" in b.note[0]
    ruled_out = made({"map": [[50, 80]], "lactate": [[8, np.nan]]}, [[(0, 0), (0, 0)]])
    assert table(None, ruled_out, (SHOCK,)).undecided[0] == 0


def test_a_value_at_the_limit_is_not_below_it():
    e = made({"map": [[55, 54, 90, 91]], "lactate": [[4, 4.1, 4, 4]]}, [[(0, 0)] * 4])
    assert reading(e, "map")[0].tolist() == [55, 54, 90, 91] and float(e.physical("map")[0, 0]) != 55
    assert table(None, e, (UNTREATED, HIGH, SHOCK)).at_risk.tolist() == [1, 1, 1]


def test_missing_features_and_drugs_are_named():
    e = made({"map": [[50, 50]]}, [[(0, 0), (0, 0)]], flags=())
    t = table(None, e, (FLOOD, SHOCK, Flag("insulin", (), most("insulin"))))
    assert t.note.tolist() == ["not known: needs feature pf_ratio", "not known: needs feature lactate",
                               "not known: needs drug insulin"]
    assert t[["patients", "at_risk", "undecided", "flagged", "share", "ci_low", "ci_high"]].isna().all(axis=None)


def test_clipped_features_cannot_be_judged():
    rows = {"map": [[50, 70]]}
    e = made(rows, [[(0, 0), (0, 0)]], flags=(), low={"map": 60}, high={"map": 90})
    notes = table(None, e, (UNTREATED, HIGH)).note
    assert (notes == "not known: map is clipped to 60 .. 90").all()
    assert table(None, made(rows, [[(0, 0)] * 2], flags=(), low={"map": 54}), (UNTREATED,)).at_risk[0] == 1


def test_nobody_at_risk():
    e = made({"map": [[70, 70]], "lactate": [[1, 1]]}, [[(0, 0), (0, 0)]])
    row = table(None, e, (UNTREATED,)).iloc[0]
    assert (row.patients, row.at_risk, row.flagged) == (0, 0, 0) and np.isnan(row.share)


def test_no_interval_of_no_width():
    at = np.ones((4, 3), bool)
    for x in (0.0, 1.0, 0.3):
        k, share, low, high = share_of(np.full((4, 3), x), at, np.arange(4))
        assert k == 4 and share == x and high - low > 0.3 and 0 <= low <= x <= high <= 1


# ---- bad input


@pytest.mark.parametrize(("call", "words"), [
    (lambda: Flag("f", (("map", "below", 55),), none("fluid")), "flag 'f'.*write"),
    (lambda: Flag("f", (), none("fluid"), before="last"), "before='last'"),
    (lambda: table(None, flags=(Flag("f", (), lambda now: np.ones(3)),)), r"flag 'f'.*\(3,\), needs \(25,\)"),
    (lambda: table(None, flags=(Flag("f", (), jumps(3, "fluid")),)), "flag 'f'.*before"),
    (lambda: table(always(0)[:2]), "policy: shape"),
    (lambda: table(2.0 * always(0)), "policy: episode 0, step 0"),
    (lambda: table(np.full(FEW.mask.shape, 0.5)), "policy: shape .* every action"),
    (lambda: table(always(0), against={"other": -always(0)}), "other: episode 0"),
    (lambda: table(None, name="clinicians", against={"clinicians": None}), "against: 'clinicians'"),
    (lambda: table(None, choice="best"), "choice='best'"),
    (lambda: levels(Continuous()), "Continuous has doses"),
    (lambda: dose_map(FEW, None, "insulin"), "drug='insulin': the actions have vasopressor, fluid"),
    (lambda: dose_map(FEW, None, across=("ci", (1, 2))), "'ci'"),
    (lambda: subgroups(FEW, always(0), model=object()), "model"),
])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words): call()


# ---- small counts


def test_small_counts_are_hidden():
    t = table(None, SOME, open_data=False, against={"never": always(0, SOME)})
    exact = table(None, SOME, against={"never": always(0, SOME)})
    few = (exact.patients < 10).to_numpy(bool)
    rare = ((exact.flagged < 10) & (exact.policy == "policy")).to_numpy() & ~few
    assert few.any() and rare.any() and not (few | rare).all()
    assert (t.patients[few] == "<10").all() and t.loc[few, ["at_risk", "flagged", "share"]].isna().all(axis=None)
    assert (t.flagged[rare] == "<10").all() and t.loc[rare, ["share", "ci_low", "ci_high"]].isna().all(axis=None)
    shown = t[~few & ~rare]
    assert (shown.share == exact.share[shown.index]).all()
    counts = pd.to_numeric(shown[["patients", "undecided"]].stack(), errors="coerce").dropna()
    assert (counts >= 10).all()


def test_the_last_group_cannot_be_subtracted():
    e = some(100, 2)
    n = np.r_[np.repeat("a", 6), np.repeat("b", 24), np.repeat("c", 70)]
    died = pd.array(np.tile([True, False], 50), dtype="boolean")
    e = replace(e, ids=e.ids.assign(unit=n, died=died))
    t = subgroups(e, None, (Factor("unit", ("unit",)),)).set_index("group")
    assert t.loc["all", "patients"] == 100 and t.loc[["a", "b", "c"], "patients"].tolist() == ["<10", "hidden", 70]
    numbers = ["stays", "died", "survived", "mortality", "mean_return"]
    assert t.loc[["a", "b"], numbers].isna().all(axis=None) and t.loc["c", numbers].notna().all()
    shown = subgroups(e, None, (Factor("unit", ("unit",)),), open_data=True).set_index("group")
    assert shown.patients.tolist() == [100, 6, 24, 70] and shown.died.tolist() == [50, 3, 12, 35]


def test_few_deaths_are_a_small_count_too():
    e = some(100, 2)
    e = replace(e, ids=e.ids.assign(died=pd.array(np.arange(100) < 4, dtype="boolean")))
    t = subgroups(e)
    assert t.patients.isin(["hidden", "<10"]).where(t.group != "not known", True).all() and t.mortality.isna().all()


# ---- subgroups


def test_groups_and_estimates_by_hand():
    e, p = SOME, softmax(SOME, 4)
    t = subgroups(e, p, open_data=True, n_boot=30, estimators=("WIS", "PDIS"), against={"clinicians": None})
    women = np.flatnonzero((e.ids.sex == "F").to_numpy())
    own = t[(t.factor == "sex") & (t.group == "female")].reset_index(drop=True)
    direct = evaluate(e.select(women), p[women], n_boot=30, estimators=("WIS", "PDIS"), against={"clinicians": None})
    shared = [c for c in COLUMNS if c not in ("n", "patients")]
    pd.testing.assert_frame_equal(own[shared], direct[shared])
    assert (own.patients == len(women)).all()
    assert np.allclose(own.mortality.astype(float), e.ids.died[women].astype(float).mean())
    age = t[(t.factor == "age (years)") & (t.estimator == "WIS") & (t.against == "")]
    expected = np.bincount(np.digitize(e.ids.age_years, (45, 65, 80)))
    assert age.patients.tolist() == expected.tolist()
    assert age.group.tolist() == ["<45", "45 to <65", "65 to <80", ">=80"]
    assert "needs sofa" in t.note[t.factor.str.startswith("SOFA")].item()


def test_sources_of_a_factor():
    sick = made({"sofa": [[4, 20], [5, 1], [np.nan, 3], [15, 0]]}, [[(0, 0)] * 2] * 4, flags=("sofa",))
    sofa = Factor("sofa", ("sofa",), edges=(5, 10, 15))
    assert group_of(sick, sofa).tolist() == ["<5", "5 to <10", "not known", ">=15"]
    by_ids = replace(sick, ids=sick.ids.assign(sofa=[1, 1, 12, pd.NA]))
    assert group_of(by_ids, sofa).tolist() == ["<5", "<5", "10 to <15", "not known"]
    female = made({"female": [[1], [0], [1]]}, [[(0, 0)]] * 3, flags=())
    sex = Factor("sex", ("sex", "female"), labels=(("F", "female"), ("M", "male"), (1.0, "female"), (0.0, "male")))
    assert group_of(female, sex).tolist() == ["female", "male", "female"]
    assert group_of(female, sofa) is None


def test_dose_map_by_hand():
    e = made({"map": [[50, 70, 70], [70, 90, np.nan]], "lactate": [[1, 5, 5], [5, 5, 5]]},
             [[(4, 0), (2, 0), (0, 0)], [(1, 0), (3, 0), (4, 0)]], flags=("map", "lactate"))
    m = dose_map(e, None, across=("map", (60, 80)), down=("lactate", (4,)), least=1)
    d = GRID.vasopressor_doses
    assert m.loc["<4", "<60"] == d[4] and m.loc[">=4", ">=80"] == d[3]
    assert m.loc[">=4", "60 to <80"] == pytest.approx((d[2] + d[0] + d[1]) / 3) and m.notna().sum().sum() == 3
    two = dose_map(e, None, across=("map", (60, 80)), down=("lactate", (4,)), least=2)
    assert two.notna().sum().sum() == 1 and dose_map(e, None).isna().all(axis=None)


def test_the_picture_writes_denominators():
    t = table(softmax(SOME, 5), SOME, against={"clinicians": None}, flags=(*SEPSIS_FLAGS, Flag("x", (), most("x"))))
    ax = draw_flags(t)
    said = [x.get_text() for x in ax.texts]
    assert f"of {t.at_risk[0]} pairs of steps, {t.patients[0]} patients" in said
    assert any("needs drug x" in x for x in said) and len(ax.patches) == 2 * 8
    hidden = draw_flags(table(None, SOME, open_data=False))
    assert any("fewer than 10" in x.get_text() for x in hidden.texts)
    plt.close("all")


# ---- stays


@pytest.fixture(scope="module", params=["sample_store", "mimic4_store"])
def stays(request) -> tuple[Episodes, pd.DataFrame]:
    store = request.getfixturevalue(request.param)
    return decision_steps(store, sepsis3(store)), store.stays


def test_on_stays(stays):
    "Denominators agree with a plain count over unimputed readings; nothing and everything are flagged as they must."
    e, people = stays
    t = safety_flags(e, always(0, e), against={"most": always(24, e), "clinicians": None}, open_data=True, n_boot=50)
    pressure = np.where(e.physical("map_missing") > 0.5, np.nan, e.physical("map"))
    lactate = np.where(e.physical("lactate_missing") > 0.5, np.nan, e.physical("lactate"))
    rows = t.set_index(["flag", "policy"])
    with np.errstate(invalid="ignore"): low = (pressure < 54.9995) & e.mask
    assert rows.loc[(UNTREATED.name, "policy"), "at_risk"] == low.sum() > 0
    with np.errstate(invalid="ignore"): shock = (pressure < 64.9995) & (lactate > 4.0005) & e.mask
    assert rows.loc[(SHOCK.name, "clinicians"), "at_risk"] == shock.sum() > 0
    untreated = rows.loc[(SHOCK.name, "clinicians"), "flagged"]
    assert untreated == (e.action[shock] == 0).sum()
    assert (rows.loc[(UNTREATED.name, "policy"), "share"], rows.loc[(UNTREATED.name, "most"), "share"]) == (1, 0)
    assert (rows.loc[(OWN.name, ["policy", "most"]), "share"] == 0).all()
    pairs = e.mask.sum() - len(e)
    assert (t.at_risk[t["of"].eq("pairs of steps") & t.flag.str.startswith("jump")] == pairs).all()
    undecided = rows.loc[(UNTREATED.name, "policy"), "undecided"]
    assert undecided == (e.mask & np.isnan(pressure)).sum() > 0
    with_sex = replace(e, ids=e.ids.merge(people[["stay_id", "sex"]], on="stay_id"))
    g = subgroups(with_sex, open_data=True)
    for factor in ("age (years)", "sex"): assert g.stays[g.factor == factor].sum() == len(e)
    assert safety_flags(e, None, against={}, n_boot=10).shape == (7, 11)
