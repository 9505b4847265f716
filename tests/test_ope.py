"Estimators of other policies' values: known numbers, properties, and what is refused."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.ope.doubly_robust import dr, magic, partial, robust_sums, simplex_minimum, wdr
from medsim.ope.importance import cwpdis, ess, importance_sampling, largest_share, pdis, sums, wis, wpdis

ONE_BY_ONE = {"IS": importance_sampling, "WIS": wis, "PDIS": pdis, "WPDIS": wpdis, "CWPDIS": cwpdis}


def episodes(seed: int, n: int = 12, t: int = 5) -> tuple[np.ndarray, ...]:
    "Ragged: ratio, reward, mask, q, v."
    rng = np.random.default_rng(seed)
    mask = np.arange(t) < rng.integers(1, t + 1, n)[:, None]
    ratio, reward, q, v = np.exp(rng.normal(0, 0.7, (n, t))), *(rng.normal(size=(n, t)) for _ in range(3))
    return ratio, reward, mask, q, v


@given(st.integers(0, 10_000), st.floats(0.5, 1.0))
@settings(max_examples=25, deadline=None)
def test_the_behaviour_itself_is_valued_at_its_mean(seed, gamma):
    _, reward, mask, q, v = episodes(seed)
    one = np.ones(mask.shape)
    mean = (gamma ** np.arange(mask.shape[1]) * reward * mask).sum(1).mean()
    for name in ("IS", "WIS", "PDIS", "CWPDIS"):
        assert ONE_BY_ONE[name](one, reward, mask, gamma) == pytest.approx(mean)
    none = np.zeros(mask.shape)
    for f in (dr, wdr): assert f(one, reward, mask, none, none, gamma) == pytest.approx(mean)
    assert (ess(one, mask) == len(mask)).all() and largest_share(one, mask) == pytest.approx(1 / len(mask))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_slow_formulas_agree(seed):
    "Every estimator as a double loop over episodes and steps."
    ratio, reward, mask, q, v = episodes(seed)
    (n, t), g = mask.shape, 0.9
    rho = np.ones((n, t + 1))  # rho[:, k] is up to step k - 1
    for i in range(n):
        for k in range(t): rho[i, k + 1] = rho[i, k] * (ratio[i, k] if mask[i, k] else 1)
    live = [[k for k in range(t) if mask[i, k]] for i in range(n)]
    gain = [sum(g**k * reward[i, k] for k in live[i]) for i in range(n)]
    got = sums(ratio, reward, mask, g).values()
    assert got["IS"] == pytest.approx(np.mean([rho[i, t] * gain[i] for i in range(n)]))
    assert got["WIS"] == pytest.approx(sum(rho[i, t] * gain[i] for i in range(n)) / rho[:, t].sum())
    paid = sum(g**k * rho[i, k + 1] * reward[i, k] for i in range(n) for k in live[i])
    assert got["PDIS"] == pytest.approx(paid / n)
    assert got["WPDIS"] == pytest.approx(paid / sum(g**k * rho[i, k + 1] for i in range(n) for k in live[i]))
    consistent = sum(g**k * sum(rho[i, k + 1] * reward[i, k] for i in range(n) if mask[i, k]) / rho[:, k + 1].sum()
                     for k in range(t))
    assert got["CWPDIS"] == pytest.approx(consistent)

    def backwards(i):
        value = 0.0
        for k in reversed(live[i]): value = v[i, k] + ratio[i, k] * (reward[i, k] + g * value - q[i, k])
        return value

    assert dr(ratio, reward, mask, q, v, g) == pytest.approx(np.mean([backwards(i) for i in range(n)]))
    share = np.column_stack([np.full(n, 1 / n), rho[:, 1:] / rho[:, 1:].sum(0)])
    slow = sum(g**k * (share[i, k + 1] * (reward[i, k] - q[i, k]) + share[i, k] * v[i, k])
               for i in range(n) for k in live[i])
    assert wdr(ratio, reward, mask, q, v, g) == pytest.approx(slow)
    parts = partial(ratio, reward, mask, q, v, g).sum(0)
    assert parts[-1] == pytest.approx(slow) and parts[0] == pytest.approx(v[:, 0].mean())
    assert parts.min() - 1e-9 <= magic(ratio, reward, mask, q, v, g) <= parts.max() + 1e-9


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_counts_are_repeated_rows(seed):
    "A replicate made by multiplicities is the estimate of the rows repeated so often; also by patient."
    data = episodes(seed)
    counts = np.random.default_rng(seed).multinomial(len(data[0]), np.full(len(data[0]), 1 / len(data[0])), size=3)
    for make, use in ((sums, data[:3]), (robust_sums, data)):
        replicates = make(*use, 0.9).values(counts)
        for b, c in enumerate(counts):
            rows = np.repeat(np.arange(len(c)), c)
            again = make(*(x[rows] for x in use), 0.9).values()
            for name, value in again.items(): assert replicates[name][b] == pytest.approx(value), name
    patient = np.arange(len(data[0])) // 2
    whole, grouped = sums(*data[:3], 0.9), sums(*data[:3], 0.9).by(patient)
    for name, value in whole.values().items(): assert grouped.values()[name] == pytest.approx(value)


@pytest.mark.parametrize("ended", ["carry", "drop"])
def test_hours_instead_of_steps(ended):
    "Discounts given step by step are those of a number where the steps are even."
    ratio, reward, mask, q, v = episodes(3)
    given = np.broadcast_to(0.9 ** np.arange(mask.shape[1]), mask.shape)
    a, b = (sums(ratio, reward, mask, g, ended).values() for g in (0.9, given))
    for name in a: assert a[name] == pytest.approx(b[name])
    assert wdr(ratio, reward, mask, q, v, given, ended=ended) == pytest.approx(wdr(ratio, reward, mask, q, v, 0.9,
                                                                                  ended=ended))


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_five_hundred_steps(factor):
    "Weights of 1e-1500 or 1e738: the ratio of sums is what it is with the common factor taken out."
    rng = np.random.default_rng(0)
    ratio, reward = np.exp(rng.normal(0, 0.02, (50, 500))), rng.normal(size=(50, 500))
    mask = np.ones((50, 500), bool)
    for f in (wis, cwpdis):
        value = f(factor * ratio, reward, mask, 0.99)
        assert np.isfinite(value) and value == pytest.approx(f(ratio, reward, mask, 0.99))
    assert ess(factor * ratio, mask)[-1] == pytest.approx(ess(ratio, mask)[-1])
    q = v = np.zeros(mask.shape)
    assert wdr(factor * ratio, reward, mask, q, v, 0.99) == pytest.approx(wdr(ratio, reward, mask, q, v, 0.99))


def test_no_overlap_is_no_number():
    ratio, reward, mask, q, v = episodes(0)
    nothing = 0 * ratio
    got = sums(nothing, reward, mask).values()
    assert np.isnan([got["WIS"], got["CWPDIS"], got["WPDIS"]]).all() and got["IS"] == got["PDIS"] == 0
    assert (ess(nothing, mask) == 0).all() and np.isnan(largest_share(nothing, mask))


@pytest.mark.parametrize(("change", "message"), [
    ({"ratio": np.nan}, "ratio: episode 2, step 0"), ({"ratio": np.inf}, "ratio: episode 2, step 0"),
    ({"ratio": -1.0}, "ratio: episode 2, step 0"), ({"reward": np.nan}, "reward: episode 2, step 0"),
    ({"q": np.nan}, "q: episode 2, step 0"), ({"v": np.inf}, "v: episode 2, step 0"),
])
def test_a_bad_number_is_named(change, message):
    names = ("ratio", "reward", "mask", "q", "v")
    data = dict(zip(names, (x.copy() for x in episodes(0)), strict=True))
    for name, value in change.items(): data[name][2, 0] = value
    with pytest.raises(ValueError, match=message): dr(*data.values())


def test_shapes_words_and_empty_episodes():
    ratio, reward, mask, q, v = episodes(0)
    with pytest.raises(ValueError, match="all must be"): wis(ratio[:, :2], reward, mask)
    with pytest.raises(ValueError, match="there is no episode"): wis(ratio[:0], reward[:0], mask[:0])
    with pytest.raises(ValueError, match="ended='forget'"): cwpdis(ratio, reward, mask, ended="forget")
    with pytest.raises(ValueError, match="gamma=1.5"): wis(ratio, reward, mask, 1.5)
    empty, gap = mask.copy(), np.ones(mask.shape, bool)
    empty[4], gap[1, 2] = False, False
    with pytest.raises(ValueError, match="mask: episode 4: has no step"): wis(ratio, reward, empty)
    with pytest.raises(ValueError, match="mask: episode 1, step 3: follows a gap"): wis(ratio, reward, gap)
    with pytest.raises(ValueError, match="q: shape"): dr(ratio, reward, mask, q[:2], v)
    ratio[~mask] = reward[~mask] = np.nan  # padding may hold anything
    assert np.isfinite(wis(ratio, reward, mask))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_least_point_of_the_simplex(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(4, 4))
    a = root @ root.T
    x = simplex_minimum(a)
    assert x.min() >= 0 and x.sum() == pytest.approx(1)
    others = rng.dirichlet(np.ones(4), 2000)
    assert x @ a @ x <= np.einsum("ni,ij,nj->n", others, a, others).min() + 1e-6 * np.trace(a)
