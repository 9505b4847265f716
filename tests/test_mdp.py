"The tabular MDP: rows, alias tables, exact values, files, and the courses that follow from it."

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from medsim.envs.exact import best_policy, can_reach, chain_values
from medsim.envs.mdp import TabularMDP, courses
from medsim.envs.mdp_files import own_rows, read_npz
from medsim.envs.transitions import Draws, Rows, alias_tables, distinct_rows, mixture


def a_ward(seed: int = 0, n: int = 6, n_actions: int = 4, concentration: float = 0.3) -> TabularMDP:
    "n live states, death, survival, absorbing; some actions inadmissible and completed by the mean."
    rng = np.random.default_rng(seed)
    p = np.zeros((n + 3, n_actions, n + 3))
    p[:n, :, : n + 2] = rng.dirichlet(np.full(n + 2, concentration), (n, n_actions))
    p[:n, :, n] += 0.05
    p[:n] /= p[:n].sum(-1, keepdims=True)
    p[n:, :, -1] = 1
    admissible = rng.random((n + 3, n_actions)) < 0.6
    admissible[np.arange(n), rng.integers(n_actions, size=n)] = True
    admissible[n:] = True
    initial = np.append(rng.dirichlet(np.ones(n)), [0, 0, 0])
    reward = np.zeros(n + 3)
    reward[n + 1] = 1
    expert = rng.dirichlet(np.ones(n_actions), n + 3)
    return TabularMDP.from_dense(p, reward, initial, admissible, expert_policy=expert).completed("mean")


def dense(mdp: TabularMDP) -> np.ndarray:
    return mdp.rows.matrix.toarray()[mdp.row_of]


# Rows and draws


@given(st.integers(0, 10_000))
def test_alias_tables_hold_every_probability(seed):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 40, rng.integers(1, 30))
    indptr = np.concatenate([[0], np.cumsum(size)])
    weight = rng.gamma(rng.choice([0.01, 0.3, 5.0]), size=indptr[-1]) + 1e-300
    prob = weight / np.repeat(np.add.reduceat(weight, indptr[:-1]), size)
    if seed % 3 == 0: prob = 1 / np.repeat(size, size)  # level from the start
    keep, other = alias_tables(indptr, prob)
    row = np.repeat(np.arange(len(size)), size)
    assert (row[other] == row).all()  # never another row's entry
    assert (keep >= -1e-12).all() and (keep <= 1).all()
    drawn = (keep + np.bincount(other, 1 - keep, len(keep))) / size[row]
    np.testing.assert_allclose(drawn, prob, atol=1e-14)


@given(st.integers(0, 10_000))
def test_distinct_rows_give_the_table_back(seed):
    rng = np.random.default_rng(seed)
    few = rng.dirichlet(np.full(7, 0.3), 4) * (rng.random((4, 7)) < 0.8)
    table = few[rng.integers(4, size=20)]
    rows, number = distinct_rows(table, 7)
    assert len(rows) == len(np.unique(table, axis=0))
    np.testing.assert_array_equal(rows.matrix.toarray()[number], table)
    again = Rows.from_matrix(rows.matrix)
    np.testing.assert_array_equal(again.prob, rows.prob)


def test_draws_by_alias_and_by_cumulative_distribution_agree():
    mdp = a_ward()
    row, n = 3, 200_000
    u = np.random.default_rng(0).random(n)
    start, stop = mdp.rows.indptr[row : row + 2]
    by_cdf = mdp.rows.next_state[start + mdp.rows.cdf[start:stop].searchsorted(u, side="right")]
    by_alias = Draws(mdp.rows)(np.full(n, row), u)
    p = mdp.rows.matrix.toarray()[row]
    for drawn in (by_cdf, by_alias):
        counts = np.bincount(drawn, minlength=len(p))
        assert (counts[p == 0] == 0).all()
        assert (np.abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)) + 1e-9).all()


# Exact values


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.9]))
def test_values_against_powers_of_the_chain(seed, gamma):
    "Sums over time, not the linear system: value, length and its second moment, occupancy."
    mdp = a_ward(seed)
    policy = np.random.default_rng(seed).dirichlet(np.ones(4), mdp.n_states)
    x = mdp.evaluate(policy, gamma)
    p = np.einsum("sa,sat->st", policy, dense(mdp))
    at, value, visits, mean, square = mdp.initial.copy(), 0.0, np.zeros(mdp.n_states), 0.0, 0.0
    t = 0
    while (at := np.where(mdp.terminal, 0, at)).sum() > 1e-14:
        visits += gamma**t * at
        value += gamma**t * at @ p @ mdp.reward
        mean, square = mean + at.sum(), square + (2 * t + 1) * at.sum()  # sums of P(L > t) and of (2 t + 1) P(L > t)
        at, t = at @ p, t + 1
    np.testing.assert_allclose([x.value, x.length, x.length_sd], [value, mean, np.sqrt(square - mean**2)], rtol=1e-8)
    np.testing.assert_allclose(x.occupancy, visits, atol=1e-9)
    np.testing.assert_allclose(mdp.initial @ x.values, x.value)
    np.testing.assert_allclose(mdp.initial @ x.lengths, x.length)


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.95]))
def test_the_optimum_satisfies_bellman_and_beats_every_policy(seed, gamma):
    mdp = a_ward(seed)
    values, policy = mdp.policy_iteration(gamma)
    swept, same = mdp.value_iteration(gamma, tol=1e-12)
    np.testing.assert_allclose(values, swept, atol=1e-8)
    np.testing.assert_allclose(mdp.q_values(values, gamma).max(1), values, atol=1e-9)
    assert set(policy.sum(1)) == {1.0} and (policy <= mdp.admissible).all()
    np.testing.assert_allclose(mdp.evaluate(policy, gamma).values, values, atol=1e-9)
    np.testing.assert_allclose(mdp.evaluate(same, gamma).value, mdp.initial @ values, atol=1e-8)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        other = mdp.restrict(rng.dirichlet(np.ones(4), mdp.n_states))
        assert (mdp.evaluate(other, gamma).values <= values + 1e-9).all()


def test_every_deterministic_policy_of_a_small_ward():
    mdp = a_ward(3, n=3, n_actions=3)
    worth = []
    for actions in np.ndindex(3, 3, 3):
        if mdp.admissible[np.arange(3), actions].all():
            worth.append(mdp.evaluate(np.array([*actions, 0, 0, 0])).value)
    assert mdp.initial @ mdp.policy_iteration()[0] == pytest.approx(max(worth), abs=1e-12)


@given(st.integers(0, 10_000))
def test_uniform_over_all_is_uniform_over_admissible(seed):
    mdp = a_ward(seed)
    a, b = mdp.evaluate(mdp.uniform_policy()), mdp.evaluate(mdp.admissible_policy())
    np.testing.assert_allclose([a.value, a.length, a.length_sd], [b.value, b.length, b.length_sd], rtol=1e-10)


def test_ties_are_settled_towards_an_end():
    "Waiting is as good as leaving once the value is known; a policy that only waits earns nothing."
    p = np.zeros((5, 2, 5))
    p[[0, 1], 0, [0, 1]] = p[0, 1, 1] = p[1, 1, 3] = p[2:, :, 4] = 1
    mdp = TabularMDP.from_dense(p, np.array([0, 0, 0, 1.0, 0]), np.array([1.0, 0, 0, 0, 0]))
    for _, policy in (mdp.policy_iteration(), mdp.value_iteration()):
        assert mdp.evaluate(policy).value == 1 and mdp.evaluate(policy).length == 2
    stay = mdp.evaluate(np.zeros(5, dtype=int))
    assert stay.value == 0 and stay.length == np.inf and stay.length_sd == np.inf


def test_a_reward_without_end_is_refused():
    p = sparse.csr_array(np.array([[1.0, 0.0], [0.0, 1.0]]))
    ends = np.array([False, True])
    with pytest.raises(ValueError, match="paid for ever"):
        chain_values(p, np.array([1.0, 0]), np.array([1.0, 0]), ends)
    assert chain_values(p, np.array([1.0, 0]), np.array([1.0, 0]), ends, 0.5).value == pytest.approx(2)
    with pytest.raises(ValueError, match="gamma=0"): chain_values(p, np.zeros(2), np.ones(2) / 2, ends, 0)


def test_can_reach_and_best_policy_leave_the_lost_alone():
    p = np.zeros((3, 1, 3))
    p[0, 0, 0] = p[1, 0, 2] = p[2, 0, 2] = 1
    assert can_reach(sparse.csr_array(p[:, 0]), np.array([False, False, True])).tolist() == [False, True, True]
    q = np.zeros((3, 1))
    assert best_policy(q, lambda w: p @ w, np.array([False, False, True])).tolist() == [[1], [1], [1]]


# Changes


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0]))
def test_perturbation_against_a_plain_loop(seed, sigma):
    mdp = a_ward(seed)
    other = mdp.perturb(sigma, seed)
    assert (other.admissible <= mdp.admissible).all()
    assert other.admissible[mdp.live].any(1).all()
    if sigma == 0: np.testing.assert_array_equal(other.admissible, mdp.admissible)
    if sigma == 1: assert (other.admissible[mdp.live].sum(1) == 1).all()
    before, after = dense(mdp), dense(other)
    for s in np.flatnonzero(mdp.live):
        mean = before[s][other.admissible[s]].mean(0)
        for a in range(mdp.n_actions):
            np.testing.assert_allclose(after[s, a], before[s, a] if other.admissible[s, a] else mean, atol=1e-12)
    np.testing.assert_array_equal(dense(mdp.perturb(sigma, seed)), after)


def test_share_struck_off():
    mdp = a_ward(1, n=400, n_actions=8)
    left = mdp.perturb(0.25, 0).admissible[mdp.live].sum() / mdp.admissible[mdp.live].sum()
    assert left == pytest.approx(0.75, abs=0.03)
    with pytest.raises(ValueError, match="sigma=1.5"): mdp.perturb(1.5)


def test_termination_kills():
    mdp = a_ward(2).completed("terminate")
    bad = np.argwhere(~mdp.admissible & mdp.live[:, None])
    for s, a in bad: assert dense(mdp)[s, a, 6] == 1
    with pytest.raises(ValueError, match="completion 'median'"): mdp.completed("median")


def test_restriction():
    mdp = a_ward(4)
    kept = mdp.restrict(mdp.expert_policy)
    assert (kept[~mdp.admissible] == 0).all() and np.allclose(kept.sum(1), 1)
    s = np.flatnonzero(mdp.live & ~mdp.admissible.all(1))[0]
    policy = mdp.admissible_policy().copy()
    policy[s] = ~mdp.admissible[s] / (~mdp.admissible[s]).sum()  # nothing is left of it
    np.testing.assert_allclose(mdp.restrict(policy)[s], mdp.admissible_policy()[s])


# Simulation


def test_episodes_of_a_rollout():
    mdp = a_ward(5)
    policy = mdp.admissible_policy()
    e = mdp.rollout(policy, 20_000, seed=3)
    x = mdp.evaluate(policy)
    steps = e.mask.sum(1)
    assert abs(e.returns().mean() - x.value) < 4 * e.returns().std() / 141
    assert abs(steps.mean() - x.length) < 4 * steps.std() / 141
    assert (e.ids.died.to_numpy() == (e.returns() == 0)).all()
    assert e.terminated.sum() == len(e) and not e.truncated.any()
    states = e.obs[..., 0].astype(int)
    np.testing.assert_allclose(e.behaviour_prob[e.mask], policy[states, e.action][e.mask], rtol=1e-6)
    assert mdp.admissible[states, e.action][e.mask].all() and mdp.live[states[e.mask]].all()
    assert mdp.terminal[e.final_obs[:, 0].astype(int)].all()
    moved = np.where(np.arange(e.mask.shape[1]) + 1 < steps[:, None], np.roll(states, -1, 1), e.final_obs.astype(int))
    assert (dense(mdp)[states[e.mask], e.action[e.mask], moved[e.mask]] > 0).all()
    assert (e.physical("state")[e.mask] == states[e.mask]).all() and (e.dt[e.mask] == 4).all()
    again = mdp.rollout(policy, 20_000, seed=3)
    for name, x in again.arrays().items(): np.testing.assert_array_equal(x, getattr(e, name))


def test_long_stays_are_truncated():
    p = np.zeros((3, 1, 3))
    p[0, 0, 0], p[0, 0, 1], p[1:, 0, 2] = 0.999, 0.001, 1
    mdp = TabularMDP.from_dense(p, np.zeros(3), np.array([1.0, 0, 0]))
    e = mdp.rollout(mdp.uniform_policy(), 50, max_steps=5)
    assert e.mask.shape[1] == 5 and e.truncated.any()
    assert (e.ids.died.isna() == e.truncated.any(1)).all()
    with pytest.raises(ValueError, match="n=0"): mdp.rollout(mdp.uniform_policy(), 0)


def test_a_stay_cannot_begin_at_its_end():
    p = np.zeros((3, 1, 3))
    p[0, 0, 1] = p[1:, 0, 2] = 1
    mdp = TabularMDP.from_dense(p, np.zeros(3), np.array([0.5, 0.5, 0]))
    with pytest.raises(ValueError, match="begins in a terminal state"): courses(mdp, mdp.uniform_policy(), 50, 0, 9)


# Bad input


def changed(**fields) -> dict:
    rng = np.random.default_rng(0)
    p = np.zeros((5, 2, 5))
    p[:2] = rng.dirichlet(np.ones(5), (2, 2))
    p[2:, :, 4] = 1
    good = {"transition": p, "reward": np.array([0, 0, 0, 1.0, 0]), "initial": np.array([1.0, 0, 0, 0, 0]),
            "admissible": np.ones((5, 2), bool)}
    return good | {k: f(good[k].copy()) for k, f in fields.items()}


def put(x: np.ndarray, at, value) -> np.ndarray:
    x[at] = value
    return x


@pytest.mark.parametrize(("fields", "message"), [
    ({"transition": lambda p: put(p, (1, 0, 2), p[1, 0, 2] + 0.1)}, r"state 1, action 0: the row sums to 1.1, not 1"),
    ({"transition": lambda p: put(put(p, (0, 1, 0), -0.2), (0, 1, 1), p[0, 1, 1] + p[0, 1, 0] + 0.2)},
     "state 0, action 1: the row has a negative"),
    ({"transition": lambda p: put(p, (0, 0, 0), np.nan)}, "state 0, action 0: the row has a negative or missing"),
    ({"transition": lambda p: p[:, :, :4]}, r"transition: shape \(5, 2, 4\)"),
    ({"transition": lambda p: put(put(p, (4, 0), 0), (4, 0, 0), 1)}, "no absorbing state"),
    ({"initial": lambda p: p * 0.5}, "initial: needs probabilities"),
    ({"initial": lambda p: p[:3]}, r"initial: shape \(3,\)"),
    ({"reward": lambda r: put(r, 0, np.inf)}, "reward: has missing or infinite"),
    ({"admissible": lambda a: put(a, 1, False)}, "state 1 has no admissible action"),
    ({"admissible": lambda a: a[:, :1]}, r"admissible: shape \(5, 1\)"),
])
def test_bad_tables_are_refused(fields, message):
    with pytest.raises(ValueError, match=message): TabularMDP.from_dense(**changed(**fields))


@pytest.mark.parametrize(("policy", "message"), [
    (np.full((5, 2), 0.4), "policy, state 0"),
    (np.full((5, 3), 1 / 3), r"policy: shape \(5, 3\)"),
    (np.array([0, 2, 0, 0, 0]), "policy, state 1: action 2"),
    (np.array([[1.5, -0.5]] * 5), "policy, state 0"),
    (np.full((5, 2), np.nan), "policy, state 0"),
])
def test_bad_policies_are_refused(policy, message):
    with pytest.raises(ValueError, match=message): TabularMDP.from_dense(**changed()).evaluate(policy)


def test_bad_extras_are_refused():
    with pytest.raises(ValueError, match="expert_policy, state 1"):
        TabularMDP.from_dense(**changed(), expert_policy=np.array([[0.5, 0.5], [0.9, 0.9], [0, 0], [0, 0], [0, 0]]))
    for name, shape in (("sofa", (4,)), ("centroids", (4, 2)), ("labels", (5, 1))):
        with pytest.raises(ValueError, match=f"{name}: shape"):
            TabularMDP.from_dense(**changed(), **{name: np.zeros(shape)})


# Files


def written(folder: Path, **files: str) -> Path:
    good = {"transitionFunction.csv": "0.5,0.5\n0,1\n0,1\n0,1\n", "rewardFunction.csv": "0,1\n",
            "initialStateDistribution.csv": "1,0\n", "admissibleActions.txt": "2 2\n0 1\n0 1\n"}
    for name, text in {**good, **{k.replace("_", "."): v for k, v in files.items()}}.items():
        (folder / name).write_text(text)
    return folder


def test_csv_folder(tmp_path):
    mdp = TabularMDP.from_csv(written(tmp_path))
    assert (mdp.n_states, mdp.n_actions) == (2, 2)
    assert mdp.evaluate(mdp.uniform_policy()).length == pytest.approx(4 / 3)


@pytest.mark.parametrize(("files", "message"), [
    ({"transitionFunction_csv": "s0,s1\n0.5,0.5\n0,1\n0,1\n0,1\n"}, "transitionFunction.csv, line 1: .* no header"),
    ({"transitionFunction_csv": "0.5,0.5\n0,1\n0,1\n"}, "transitionFunction.csv: 3 lines are not a multiple"),
    ({"transitionFunction_csv": "0.5,0.5\n0,1\n0,x\n0,1\n"}, "transitionFunction.csv, line 3"),
    ({"transitionFunction_csv": "0.5,0.5\n0,1\n0,1,0\n0,1\n"}, "csv, line 3: 3 numbers for 2 states"),
    ({"transitionFunction_csv": "0.5,0.6\n0,1\n0,1\n0,1\n"}, "state 0, action 0: the row sums to 1.1"),
    ({"rewardFunction_csv": "0,1,2\n"}, "rewardFunction.csv: 3 states"),
    ({"rewardFunction_csv": "survival\n1\n"}, "rewardFunction.csv, line 1"),
    ({"initialStateDistribution_csv": ""}, "initialStateDistribution.csv: the file is empty"),
    ({"admissibleActions_txt": "2 2\n0 1\n"}, "counts for 2 states, but 1 lines"),
    ({"admissibleActions_txt": "2 2\n0 7\n0 1\n"}, "line 2: unknown action 7"),
    ({"admissibleActions_txt": "1 2\n0 1\n0 1\n"}, "line 2: 2 actions, but line 1 counts 1"),
])
def test_bad_csv_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message): TabularMDP.from_csv(written(tmp_path, **files))


def test_missing_files_are_named(tmp_path):
    written(tmp_path)
    (tmp_path / "rewardFunction.csv").unlink()
    with pytest.raises(FileNotFoundError, match="lacks rewardFunction.csv"): TabularMDP.from_csv(tmp_path)


@given(st.integers(0, 10_000))
def test_files_give_back_every_bit(tmp_path_factory, seed):
    mdp, folder = a_ward(seed), tmp_path_factory.mktemp("mdp")
    mdp.to_csv(folder / "csv")
    mdp.save(folder / "saved")
    np.savez(folder / "dynamics.npz", tx_mat=dense(mdp), d_0=mdp.initial, expert_policy=mdp.expert_policy,
             r_mat=np.broadcast_to(mdp.reward, dense(mdp).shape))
    for other in (TabularMDP.from_csv(folder / "csv"), TabularMDP.load(folder / "saved"),
                  TabularMDP.from_npz(folder / "dynamics.npz")):
        np.testing.assert_array_equal(dense(other), dense(mdp))
        for name in ("reward", "initial", "expert_policy"):
            np.testing.assert_array_equal(getattr(other, name), getattr(mdp, name))
        if other.meta.get("source") != "dynamics.npz": np.testing.assert_array_equal(other.admissible, mdp.admissible)
    with pytest.raises(ValueError, match="not empty"): mdp.to_csv(folder / "csv")


def test_admissible_actions_recovered_from_rows():
    p = np.array([[[0.2, 0.8], [0.6, 0.4], [0.4, 0.6], [0.4, 0.6]], [[0, 1.0]] * 4])
    rows, number = distinct_rows(p.reshape(-1, 2), 2)
    assert own_rows(rows, number.reshape(2, 4), np.array([0, 3])).tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]


def test_bad_archives_are_refused(tmp_path):
    p = dense(a_ward())
    n = len(p)
    cases = {
        "lacks d_0, r_mat": {"tx_mat": p},
        "tx_mat is": {"tx_mat": p[:, :, :-1], "r_mat": p, "d_0": np.ones(n) / n},
        "r_mat is": {"tx_mat": p, "r_mat": p[:-1], "d_0": np.ones(n) / n},
        "depend on the way": {"tx_mat": p, "r_mat": np.random.default_rng(0).random(p.shape), "d_0": np.ones(n) / n},
        "needs float64": {"tx_mat": p.astype(np.float32), "r_mat": p, "d_0": np.ones(n) / n},
    }
    for message, arrays in cases.items():
        np.savez(tmp_path / "dynamics.npz", **arrays)
        with pytest.raises(ValueError, match=message): read_npz(tmp_path / "dynamics.npz")


def test_mixture_is_a_weighted_sum():
    rng = np.random.default_rng(0)
    row_of, weight = rng.integers(5, size=(4, 3)), rng.random((4, 3))
    matrix = rng.random((5, 6))
    np.testing.assert_allclose(
        mixture(row_of, weight, 5) @ matrix, np.einsum("sa,sat->st", weight, matrix[row_of]))
