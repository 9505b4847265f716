"Mortality read off predicted returns: known numbers, properties, controls, and what is refused."

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.ope.calibration import CONTROLS, binned, estimated_mortality, mortality_curve, moving_mean


def cohort(seed: int, n: int = 400) -> SimpleNamespace:
    "Returns whose patients die the less, the higher the return; policies close to the clinicians."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    near = {name: x + rng.normal(shift, 0.2, n) for name, shift in (("learned", 0.5), *((c, -0.5) for c in CONTROLS))}
    return SimpleNamespace(x=x, died=rng.random(n) < 1 / (1 + np.exp(1 + x)), policies={"learned": near["learned"]},
                           controls={c: near[c] for c in CONTROLS}, n=n)


def table_of(c: SimpleNamespace, **how) -> pd.DataFrame:
    given = dict(controls=c.controls, n_boot=50, bins=10, smooth=3) | how
    return estimated_mortality(c.x, c.died, c.policies, **given).table.set_index(["policy", "against"])


# ---- the curve


def test_curve_by_hand():
    returns = np.array([0, 0.2, 0.9, 1.0, 1.5, 1.6, 3.5, 4])
    died = np.array([1, 1, 1, 0, 1, 0, 0, 0])
    c = mortality_curve(returns, died, bins=4, smooth=1, tail=0)
    assert np.allclose(c.centres, [0.5, 1.5, 2.5, 3.5]) and c.counts.tolist() == [4, 2, 0, 2]
    assert np.allclose(c.mortality, [0.75, 0.5, np.nan, 0], equal_nan=True)
    assert np.allclose(c.of(np.array([1.0, 2.5, 2.51, -9, 9])), [0.75, 0.5, 0, 0.75, 0])  # a tie: the lower return
    smooth = mortality_curve(returns, died, bins=4, smooth=3, tail=0)
    assert np.allclose(smooth.mortality, [0.625, 0.625, 0.25, 0])  # the empty bin takes no part
    assert c.outside(np.array([-0.1, 0, 2, 4, 4.1])) == pytest.approx(0.4)


def test_tails_have_no_part():
    returns, died = np.arange(1001.0), np.arange(1001) < 200
    c = mortality_curve(returns, died)
    assert (c.low, c.high) == (10, 990) and c.counts.sum() == 981 and c.outside(returns) == pytest.approx(20 / 1001)
    returns[-1] = 1e9  # one wild prediction moves no bin
    assert np.array_equal(mortality_curve(returns, died).mortality, c.mortality)


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=1, max_size=15), st.integers(1, 12))
def test_moving_mean_is_its_slow_self(values, width):
    x, half = np.array(values), width // 2
    for i, got in enumerate(moving_mean(x, width)):
        near = [(j, 0.5 if width % 2 == 0 and abs(i - j) == half else 1.0) for j in range(len(x)) if abs(i - j) <= half]
        near = [(j, w) for j, w in near if np.isfinite(x[j])]
        slow = sum(w * x[j] for j, w in near) / sum(w for _, w in near) if near else np.nan
        assert got == pytest.approx(slow, abs=1e-12, nan_ok=True)


@given(st.integers(0, 10_000), st.integers(2, 20), st.integers(1, 20))
@settings(max_examples=40)
def test_falling_mortality_stays_falling(seed, bins, smooth):
    x = np.random.default_rng(seed).gamma(1.0, size=100)
    c = binned(x, (x < np.median(x)).astype(float), bins, smooth)
    known = c.mortality[np.isfinite(c.mortality)]
    assert (np.diff(known) <= 1e-12).all() and ((known >= 0) & (known <= 1)).all()


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_order_and_scale_do_not_matter(seed):
    c = cohort(seed)
    got, rows = mortality_curve(c.x, c.died), np.random.default_rng(seed).permutation(c.n)
    other = mortality_curve(8 * c.x[rows] + 2, c.died[rows])  # 8 and 2 are exact in binary
    assert np.allclose(got.mortality, other.mortality, atol=0.05, equal_nan=True)
    assert abs(got.counts - other.counts).sum() <= 2  # a return on an edge may fall to either side
    assert np.array_equal(got.of(c.x)[rows], got.of(c.x[rows]))


# ---- estimates


@given(st.integers(0, 10_000))
@settings(max_examples=10)
def test_estimates(seed):
    c = cohort(seed)
    e = estimated_mortality(c.x, c.died, {**c.policies, "same": c.x}, controls=c.controls, n_boot=30)
    t = e.table.set_index(["policy", "against"])
    for name, x in e.returns.items():
        assert t.value[name, ""] == pytest.approx(e.curve.of(x).mean())
        assert t.value[name, "observed"] == pytest.approx(t.value[name, ""] - c.died.mean())
        assert t.outside[name, ""] == e.curve.outside(x)
    assert t.loc[("same", "clinicians"), ["value", "ci_low", "ci_high"]].tolist() == [0, 0, 0]
    assert t.value["learned", "clinicians"] == pytest.approx(t.value["learned", ""] - t.value["clinicians", ""])
    assert t.value["learned", "clinicians"] < 0 < t.value["random", "clinicians"]
    assert e.band.shape == (2, 20) and (e.band[0] <= e.band[1]).all()


def test_interval_holds_the_point_and_repeats():
    c = cohort(0, 2_000)
    a, b, other = (table_of(c, n_boot=200, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(a, b)
    assert ((a.ci_low <= a.value) & (a.value <= a.ci_high)).all() and (a.ci_low < a.ci_high).all()
    assert not np.allclose(a.ci_low, other.ci_low) and np.allclose(a.value, other.value)
    narrow, wide = (table_of(c, level=level, n_boot=200) for level in (0.5, 0.99))
    assert (narrow.ci_high - narrow.ci_low < wide.ci_high - wide.ci_low).all()


def test_interval_is_the_spread_over_new_patients():
    "Of a fixed model, from fresh cohorts."
    many = [table_of(cohort(s, 1_000), n_boot=1).value["learned", ""] for s in range(60)]
    one = table_of(cohort(99, 1_000), n_boot=300).loc[("learned", "")]
    assert (one.ci_high - one.ci_low) / 3.92 == pytest.approx(np.std(many), rel=0.35)


def test_stays_of_a_patient_come_along():
    "Every row four times is no more patients; as many more patients would halve the interval."
    c = cohort(3)
    four = SimpleNamespace(x=np.tile(c.x, 4), died=np.tile(c.died, 4), n=4 * c.n, **{
        k: {name: np.tile(x, 4) for name, x in getattr(c, k).items()} for k in ("policies", "controls")})
    once, same = table_of(c, n_boot=200), table_of(four, subjects=np.tile(np.arange(c.n), 4), n_boot=200)
    alone = table_of(four, n_boot=200)
    assert (same.patients == c.n).all() and (same.n == 4 * c.n).all()
    width = {k: t.ci_high["learned", ""] - t.ci_low["learned", ""] for k, t in
             dict(once=once, same=same, alone=alone).items()}
    assert width["same"] == pytest.approx(width["once"], rel=0.1) and width["alone"] < 0.65 * width["once"]


def test_steps_belong_to_patients():
    c = cohort(4)
    t = table_of(c, unit="step", subjects=np.arange(c.n) // 5, most_outside=0.0)
    assert (t.patients == c.n // 5).all() and "% of the steps beyond" in t.flag["learned", ""]


# ---- controls and flags


def test_controls_have_the_last_word():
    c = cohort(0)
    assert table_of(c).controls["learned", ""] == "no control seems to lower mortality"
    none = table_of(c, controls=None)
    assert none.controls["learned", ""] == "without negative controls: random and no treatment"
    half = table_of(c, controls={"random": c.x - 0.5})
    assert half.controls["learned", ""] == "without negative controls: no treatment"
    good = table_of(c, controls=c.controls | {"no treatment": c.x + 0.6})
    said = good.controls["learned", ""]
    assert said.startswith("not to be believed") and "no treatment (by" in said and "random" not in said
    assert good.controls["no treatment", ""] == "seems to lower mortality"
    assert good.controls["random", ""] == "does not seem to lower mortality" and good.controls["clinicians", ""] == ""
    slight = table_of(c, controls=c.controls | {"random": c.x + 0.01}, negligible=0.05)
    assert slight.controls["learned", ""] == "no control seems to lower mortality"


def test_beyond_the_curve_is_flagged():
    c = cohort(0)
    far = SimpleNamespace(**vars(c) | {"policies": {"learned": np.where(np.arange(c.n) < c.n // 4, 99.0, 0.0)}})
    t = table_of(far)
    assert t.outside["learned", ""] == 0.25 and "25 % of the stays beyond the curve" in t.flag["learned", ""]
    assert "beyond" not in t.flag["clinicians", ""]


def test_a_curve_that_misses_the_mortality_is_flagged():
    "Deaths crowd in a tail that the bins leave out."
    rng = np.random.default_rng(0)
    x, died = rng.exponential(size=3_000), np.zeros(3_000, bool)
    died[np.argsort(x)[:1500]] = True
    t = table_of(SimpleNamespace(x=x, died=died, policies={"learned": x}, controls={}), bins=5, smooth=5)
    assert (t.flag.str.contains("the curve misses the observed mortality")).all()


def test_few_deaths_and_replicates_without_one():
    c = cohort(0)
    c.died = np.arange(c.n) == 7
    t = table_of(c)
    assert np.isfinite(t[["value", "ci_low", "ci_high"]].to_numpy()).all() and t.ci_low["clinicians", ""] == 0


def test_drawn():
    import matplotlib.pyplot as plt

    c = cohort(0)
    top, below = estimated_mortality(c.x, c.died, c.policies, controls=c.controls, n_boot=5).draw()
    said = [t.get_text() for t in top.get_legend().get_texts()]
    assert {"clinicians", "learned", "random (control)"} <= set(said) and below.get_ylabel() == "stays"
    plt.close("all")


# ---- what is refused


@pytest.mark.parametrize("change, message", [
    (dict(x=[np.nan]), "returns: episode 0"),
    (dict(x=[np.inf]), "returns: episode 0"),
    (dict(died=[np.nan]), "died: episode 0: must be 0 or 1"),
    (dict(died=[0.5]), "died: episode 0: must be 0 or 1"),
    (dict(policies={"learned": np.full(400, np.nan)}), "learned: episode 0"),
    (dict(policies={"learned": np.zeros(399)}), "learned: 399 returns, 400 outcomes"),
    (dict(policies={"learned": np.zeros((400, 2))}), "learned: shape"),
    (dict(policies={"random": np.zeros(400)}), "the name random is taken"),
    (dict(policies={"clinicians": np.zeros(400)}), "the name clinicians is taken"),
])
def test_bad_rows(change, message):
    c = cohort(0)
    for key, value in change.items():
        if isinstance(value, list): value = np.concatenate([value, getattr(c, key)[1:].astype(float)])
        setattr(c, key, value)
    with pytest.raises(ValueError, match=message): table_of(c)


@pytest.mark.parametrize("how, message", [
    (dict(bins=1), "at least 2 bins"), (dict(smooth=0), "at least 2 bins"), (dict(tail=0.5), "tail=0.5"),
    (dict(bins=401), "400 rows for 401 bins"), (dict(n_boot=0), "n_boot=0"), (dict(level=1.0), "level=1.0"),
    (dict(unit="step"), "steps of a patient belong together"), (dict(subjects=np.zeros(400)), "only one patient"),
    (dict(subjects=np.zeros(3)), "3 for 400 rows"), (dict(subjects=[None, *range(399)]), "has no patient"),
])
def test_bad_settings(how, message):
    with pytest.raises(ValueError, match=message): table_of(cohort(0), **how)


def test_no_curve_without_two_outcomes_or_two_returns():
    c = cohort(0)
    with pytest.raises(ValueError, match="every patient died"): mortality_curve(c.x, np.ones(c.n, bool))
    with pytest.raises(ValueError, match="no patient died"): mortality_curve(c.x, np.zeros(c.n, bool))
    with pytest.raises(ValueError, match="nothing to sort by"): mortality_curve(np.ones(c.n), c.died)
    with pytest.raises(ValueError, match="0 rows"): mortality_curve(np.zeros(0), np.zeros(0, bool))
    with pytest.raises(ValueError, match="NaN"): mortality_curve(c.x, c.died).of(np.array([np.nan]))
    unknown = pd.array([True, pd.NA] * 200, dtype="boolean")
    with pytest.raises(ValueError, match="died: episode 1"): mortality_curve(c.x, unknown)
    assert mortality_curve(c.x, pd.array(c.died, dtype="boolean")).counts.sum() > 0
