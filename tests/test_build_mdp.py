"An MDP from trajectories: flow balance, a slow second opinion, the round trip, gaps, dead states, bad input, records."

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsim.envs.tabular import COMPLETIONS, GAPS, TRAPPED, TabularMDP, build_mdp, trajectories, transfer

COLUMNS = ["stay_id", "block", "state", "action", "died"]


def made_table(seed: int, stays: int = 20, states: int = 6, actions: int = 3, missing: float = 0.0) -> pd.DataFrame:
    "Random stays that linger in a state; with `missing`, that share of the blocks is not there. Rows in no order."
    rng = np.random.default_rng(seed)
    stay = np.repeat(np.arange(stays) + 100, rng.integers(1, 9, stays))
    block = pd.Series(stay).groupby(stay).cumcount() + 3
    state = rng.integers(0, states, len(stay) + 1)[np.cumsum(rng.random(len(stay)) < 0.3)]
    table = pd.DataFrame({"stay_id": stay, "block": block, "state": 10 * state,
                          "action": rng.integers(0, actions, len(stay)), "died": (rng.random(stays) < 0.4)[stay - 100]})
    return table[rng.random(len(table)) >= missing].sample(frac=1, random_state=seed)


def dense(mdp: TabularMDP) -> np.ndarray:
    return mdp.rows.matrix.toarray()[mdp.row_of]


# ---- what must hold whatever the data


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.sampled_from([0.0, 0.2]))
def test_flow_balance(seed, stays, states, actions, missing):
    table = made_table(seed, stays, states, actions, missing)
    if table.empty: return
    mdp = build_mdp(table, threshold=0, n_actions=actions)
    value = mdp.evaluate(mdp.expert_policy)
    assert abs(value.value - (1 - table.groupby("stay_id").died.first().mean())) < 1e-10
    assert abs(value.length - table.groupby("stay_id").size().mean()) < 1e-10
    visits = table.state.value_counts() / table.stay_id.nunique()
    assert np.allclose(value.occupancy[mdp.live], visits[mdp.labels[mdp.live]], atol=1e-10)
    assert mdp.admissible[mdp.live].sum() == len(table.drop_duplicates(["state", "action"]))


# ---- a second opinion


def slow(table: pd.DataFrame, threshold, strict, gaps, completion, trapped, n_actions):
    "The same MDP by loops: (labels, transitions, initial, admissible, clinicians), or None if nothing is left."
    n, starts = {}, []
    for _, rows in table.sort_values(["stay_id", "block"]).groupby("stay_id"):
        rows = list(rows.itertuples())
        starts.append(rows[0].state)
        for i, row in enumerate(rows):
            end = "death" if row.died else "survival"
            then = rows[i + 1].state if i + 1 < len(rows) else end
            if i + 1 < len(rows) and rows[i + 1].block != row.block + 1:
                if gaps == "drop": continue
                if gaps == "end": then = end
            n.setdefault((row.state, row.action), []).append(then)
    total = {pair: len(then) for pair, then in n.items()}
    left = {p: list(t) for p, t in n.items() if (total[p] > threshold if strict else total[p] >= threshold)}
    states = {row.state for row in table.itertuples()}
    while True:
        alive = {s for s in states if any(p[0] == s for p in left)}
        kept = {p: [t for t in then if t in alive or isinstance(t, str)] for p, then in left.items() if p[0] in alive}
        kept = {p: then for p, then in kept.items() if then}
        if alive == states and kept == left:
            out = {"death", "survival"}  # what an end can be reached from
            for _ in states: out |= {s for (s, _), then in left.items() if out & set(then)}
            if trapped == "keep" or states <= out: break
            states, left = states & out, {p: then for p, then in left.items() if p[0] in out}
            left = {p: kept for p, then in left.items() if (kept := [t for t in then if t in states or t in out])}
            continue
        states, left = alive, kept
    if not states: return None
    labels = sorted(states)
    place = {s: i for i, s in enumerate([*labels, "death", "survival", "absorbing"])}
    p = np.zeros((len(place), n_actions, len(place)))
    for (s, a), then in left.items():
        for t in then: p[place[s], a, place[t]] += 1 / len(then)
    admissible = np.zeros((len(place), n_actions), dtype=bool)
    for s, a in left: admissible[place[s], a] = True
    for s in labels:
        own = [a for a in range(n_actions) if (s, a) in left]
        weight = {"mean": [1] * len(own), "first": [1] + [0] * (len(own) - 1), "weighted": [total[s, a] for a in own]}
        parts = zip(weight[completion], own, strict=True)
        rest = sum(w * p[place[s], a] for w, a in parts) / sum(weight[completion])
        for a in set(range(n_actions)) - set(own): p[place[s], a] = rest
    p[-3:, :, -1], admissible[-3:] = 1, True
    initial, did = np.zeros(len(place)), np.zeros((len(place), n_actions))
    for s in starts:
        if s in states: initial[place[s]] += 1
    for s in labels:
        for a in range(n_actions): did[place[s], a] = total.get((s, a), 0)
        did[place[s]] /= did[place[s]].sum()
    return labels, p, initial, admissible, did


OPTIONS = list(itertools.product((0, 2, 4, 90), (False, True), GAPS, COMPLETIONS, TRAPPED))


@pytest.mark.parametrize("seed", range(2))
def test_a_slow_builder_agrees(seed):
    table, agreed, refused, caught = made_table(seed, 20, 12, 3, missing=0.2), 0, 0, 0
    for threshold, strict, gaps, completion, trapped in OPTIONS:
        options = dict(threshold=threshold, strict=strict, gaps=gaps, completion=completion, trapped=trapped)
        expected = slow(table, **options, n_actions=3)
        if expected is None or expected[2].sum() == 0:
            with pytest.raises(ValueError, match="lower the threshold"): build_mdp(table, **options, n_actions=3)
            refused += 1
            continue
        labels, p, initial, admissible, did = expected
        mdp = build_mdp(table, **options, n_actions=3)
        assert mdp.labels.tolist() == [*labels, -1, -1, -1]
        assert mdp.terminal[-3:].all() and mdp.live.sum() == len(labels)
        assert np.allclose(dense(mdp), p, atol=1e-12)
        assert np.allclose(mdp.initial, initial / initial.sum()) and np.array_equal(mdp.admissible, admissible)
        assert np.allclose(mdp.expert_policy[mdp.live], did[mdp.live])
        assert mdp.meta["pairs"] == admissible[:-3].sum() and mdp.meta["options"] == options
        agreed += 1
        caught += mdp.meta["trapped"] > 0
    assert agreed >= 60 and refused and caught


def test_rows_may_come_in_any_order_and_index():
    table = made_table(3)
    other = table.sort_values("state").set_index("stay_id", drop=False)
    one, two = (build_mdp(t, threshold=1, n_actions=3) for t in (table, other))
    assert np.array_equal(dense(one), dense(two)) and one.meta == two.meta


def test_weighted_completion_is_the_clinicians_among_the_admissible():
    mdp = build_mdp(made_table(1, 60, 4, 5), threshold=12, n_actions=5, completion="weighted")
    s, a = np.argwhere(~mdp.admissible)[0]
    expected = mdp.restrict(mdp.expert_policy)[s] @ dense(mdp)[s]
    assert np.allclose(dense(mdp)[s, a], expected)


# ---- by hand


def stay(stay_id, died, *visits):
    return [(stay_id, block, state, action, died) for block, state, action in visits]


GAPPED = pd.DataFrame(
    stay(1, False, (0, 0, 0), (1, 1, 0), (4, 0, 0)) + stay(2, True, (0, 1, 0), (1, 0, 0)), columns=COLUMNS
)


@pytest.mark.parametrize(("gaps", "p01", "p10", "length"), [
    ("bridge", [1 / 3, 1 / 3, 1 / 3], [1, 0, 0], 2.5),  # from 0: to 1, death, survival; from 1: to 0, death, survival
    ("end", [1 / 3, 1 / 3, 1 / 3], [1 / 2, 0, 1 / 2], 1.7),
    ("drop", [1 / 3, 1 / 3, 1 / 3], [1, 0, 0], 2.5),
])
def test_gaps_on_two_stays(gaps, p01, p10, length):
    mdp = build_mdp(GAPPED, threshold=1, n_actions=1, gaps=gaps)
    p = dense(mdp)[:, 0]
    assert np.allclose(p[0, 1:4], p01) and np.allclose(p[1, [0, 2, 3]], p10)
    assert mdp.meta["gaps"] == 1 and mdp.meta["steps_counted"] == (4 if gaps == "drop" else 5)
    assert np.isclose(mdp.evaluate(mdp.expert_policy).length, length)


def test_spurious_ends_shorten_the_stay():
    table = made_table(5, 300, 8, 3, missing=0.25)
    bridge, end = (build_mdp(table, threshold=0, n_actions=3, gaps=g) for g in ("bridge", "end"))
    ends = end.evaluate(end.expert_policy).occupancy.sum()
    assert ends < 0.8 * bridge.evaluate(bridge.expert_policy).occupancy.sum()


def cascade() -> pd.DataFrame:
    "0 -> 1 -> 2 -> 3 three times, 3 left once under each of three actions; 4 goes to 0 once and lives three times."
    rows = []
    for k in range(3): rows += stay(k, False, (0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, k))
    rows += stay(3, True, (0, 4, 0), (1, 0, 1))
    for k in range(3): rows += stay(4 + k, False, (0, 4, 0))
    return pd.DataFrame(rows, columns=COLUMNS)


def test_dead_states_fall_one_after_the_other():
    mdp = build_mdp(cascade(), threshold=3, n_actions=3)
    assert mdp.meta["removed"] == [1, 1, 1, 1] and mdp.labels.tolist() == [4, -1, -1, -1]
    assert dense(mdp)[0, 0].tolist() == [0, 0, 1, 0] and mdp.initial.tolist() == [1, 0, 0, 0]
    assert mdp.meta["trapped"] == 0 and mdp.meta["steps_left"] == 3
    assert build_mdp(cascade(), threshold=1, n_actions=3).meta["removed"] == []


def test_trapped_states_are_counted_and_may_go():
    rows = [r for k in range(3) for r in stay(k, False, (0, 0, 0), (1, 0, 0), (2, 1, k))]
    rows += stay(3, False, (0, 2, 0)) + stay(4, False, (0, 2, 0)) + stay(5, False, (0, 2, 0))
    mdp = build_mdp(pd.DataFrame(rows, columns=COLUMNS), threshold=3, n_actions=3)
    assert mdp.labels[:2].tolist() == [0, 2] and mdp.meta["trapped"] == 1
    assert mdp.evaluate(mdp.admissible_policy()).length == np.inf
    free = build_mdp(pd.DataFrame(rows, columns=COLUMNS), threshold=3, n_actions=3, trapped="remove")
    assert free.labels[:1].tolist() == [2] and free.meta["trapped"] == 1 and free.n_states == 4


def test_thresholds_at_the_border():
    table = pd.DataFrame([r for k in range(5) for r in stay(k, k < 2, (0, 0, 0 if k < 3 else 1))], columns=COLUMNS)
    allowed = {(t, strict): build_mdp(table, threshold=t, strict=strict, n_actions=2).admissible[0].tolist()
               for t in (1, 2) for strict in (False, True)}
    both, first = [True, True], [True, False]
    assert allowed == {(1, False): both, (1, True): both, (2, False): both, (2, True): first}


def test_a_stay_that_begins_in_a_removed_state_has_no_beginning():
    rows = stay(0, False, (0, 7, 0), (1, 3, 0)) + stay(1, True, (0, 3, 0)) + stay(2, True, (5, 4, 0), (6, 3, 0))
    mdp = build_mdp(pd.DataFrame(rows, columns=COLUMNS), threshold=2, n_actions=1)
    assert mdp.labels.tolist() == [3, -1, -1, -1] and mdp.initial.tolist() == [1, 0, 0, 0]
    assert np.isclose(mdp.evaluate(mdp.expert_policy).value, 1 / 3)


def test_clusters_bring_their_centroids_and_scores():
    table = cascade()
    about = dict(centroids=np.arange(10).reshape(5, 2), sofa=np.arange(5), step_h=2.0, meta={"source": "by hand"})
    mdp = build_mdp(table, threshold=3, n_actions=3, **about)
    assert mdp.centroids[0].tolist() == [8, 9] and mdp.sofa[0] == 4
    assert mdp.step_h == 2 and mdp.meta["source"] == "by hand"
    with pytest.raises(ValueError, match="centroids: 4 rows, but the table has a state 4"):
        build_mdp(table, threshold=3, n_actions=3, centroids=np.zeros((4, 2)))


def test_a_built_mdp_can_be_kept(tmp_path):
    mdp = build_mdp(made_table(2, 80), threshold=5, n_actions=3, centroids=np.ones((51, 2)), meta={"source": "made up"})
    json.dumps(mdp.meta, allow_nan=False)
    mdp.save(tmp_path / "kept")
    mdp.to_csv(tmp_path / "csv")
    kept, published = TabularMDP.load(tmp_path / "kept"), TabularMDP.from_csv(tmp_path / "csv")
    assert kept.meta == mdp.meta and np.array_equal(kept.labels, mdp.labels) and np.array_equal(dense(kept), dense(mdp))
    assert np.array_equal(published.admissible[mdp.live], mdp.admissible[mdp.live])
    assert np.isclose(*(m.evaluate(m.admissible_policy()).value for m in (published, mdp)))


# ---- bad input


GOOD = made_table(0).reset_index(drop=True)


def with_cell(column: str, row: int, value) -> pd.DataFrame:
    bad = GOOD.astype({column: object})
    bad.loc[row, column] = value
    return bad


SECOND = GOOD.index[GOOD.stay_id == GOOD.stay_id.value_counts().index[0]][1]  # a later row of the longest stay
BAD = {
    "no outcome": (with_cell("died", 4, None), {}, r"'died': 1 of \d+ rows have no outcome.*row 4"),
    "odd outcome": (with_cell("died", 4, 2), {}, "'died'.*neither True nor False.*row 4"),
    "outcome in words": (with_cell("died", 4, "yes"), {}, "'died'.*neither True nor False.*row 4"),
    "outcome changes": (with_cell("died", SECOND, not GOOD.died[SECOND]), {}, f"'died'.*differ.*row {SECOND}"),
    "a block twice": (pd.concat([GOOD, GOOD[3:4]]), {}, f"'block': 1 of .* repeat a block.*row {len(GOOD)}"),
    "unknown action": (with_cell("action", 2, 3), {}, "'action'.*outside 0 to 2.*row 2"),
    "negative action": (with_cell("action", 2, -1), {}, "'action'.*outside 0 to 2.*row 2"),
    "negative state": (with_cell("state", 2, -1), {}, "'state'.*negative.*row 2"),
    "half a state": (with_cell("state", 2, 1.5), {}, "'state'.*no whole number.*row 2"),
    "state without number": (with_cell("state", 2, "A"), {}, "'state'.*no number.*row 2"),
    "missing state": (with_cell("state", 2, None), {}, "'state'.*no number.*row 2"),
    "infinite block": (with_cell("block", 2, np.inf), {}, "'block'.*no number.*row 2"),
    "nobody's row": (with_cell("stay_id", 2, None), {}, "'stay_id'.*no stay.*row 2"),
    "missing columns": (GOOD.drop(columns=["died", "block"]), {}, "lacks the columns block, died"),
    "empty": (GOOD[:0], {}, "empty"),
    "nothing left": (GOOD, dict(threshold=1000), r"at least 1000 times, and the largest count is \d+; lower"),
    "nothing left, strictly": (GOOD, dict(threshold=1000, strict=True), "more than 1000 times"),
    "threshold": (GOOD, dict(threshold=-1), "threshold=-1"),
    "no threshold": (GOOD, dict(threshold=np.nan), "threshold=nan"),
    "gaps": (GOOD, dict(gaps="fill"), "gaps='fill'"),
    "trapped": (GOOD, dict(trapped="free"), "trapped='free'"),
    "completion": (GOOD, dict(completion="zero"), "completion='zero'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    table, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build_mdp(table, **{"threshold": 1, "n_actions": 3, **options})


def test_no_beginning_is_left():
    rows = [r for k in range(3) for r in stay(k, False, (0, k, 0), (1, 9, 0))]
    with pytest.raises(ValueError, match="none of 3 stays begins in a state that is left"):
        build_mdp(pd.DataFrame(rows, columns=COLUMNS), threshold=2, n_actions=1)


# ---- there and back


def small_truth(seed: int = 0) -> TabularMDP:
    rng, n, a = np.random.default_rng(seed), 12, 4
    p = np.zeros((n + 3, a, n + 3))
    p[:n, :, : n + 2] = 0.9 * rng.dirichlet(np.full(n + 2, 0.3), (n, a))
    p[:n, :, : n + 2] += 0.1 * np.eye(n + 2)[n + rng.integers(0, 2, (n, a))]
    p[n:, :, -1] = 1
    allowed = rng.random((n + 3, a)) < 0.6
    allowed[:, 0] = True
    start = np.append(rng.dirichlet(np.ones(n)), np.zeros(3))
    return TabularMDP.from_dense(p, np.eye(n + 3)[n + 1], start, allowed).completed("mean")


def test_rollouts_are_a_table_and_come_back():
    truth = small_truth()
    episodes = truth.rollout(truth.admissible_policy(), 30_000, seed=1)
    table = trajectories(episodes)
    assert len(table) == episodes.mask.sum()
    assert table.groupby("stay_id").died.first().tolist() == episodes.ids.died.tolist()
    built = build_mdp(table, threshold=20, n_actions=truth.n_actions)
    same = built.labels[built.live]
    assert np.array_equal(built.admissible[built.live], truth.admissible[same])
    assert np.abs(dense(built)[built.live][:, :, built.live] - dense(truth)[same][:, :, same]).max() < 0.05
    policy = built.policy_iteration()[1]
    best = truth.evaluate(truth.policy_iteration()[1]).value
    assert best - 0.02 < truth.evaluate(transfer(policy, built, truth)).value <= best + 1e-12


def test_a_policy_is_taken_over_by_labels():
    truth = small_truth()
    few = build_mdp(trajectories(truth.rollout(truth.admissible_policy(), 200, seed=2)), threshold=40, n_actions=4)
    assert few.live.sum() < truth.live.sum()
    moved = transfer(few.expert_policy, few, truth)
    known = few.labels[few.live]
    unknown = np.setdiff1d(np.flatnonzero(truth.live), known)
    assert np.array_equal(moved[known], few.expert_policy[few.live])
    assert np.array_equal(moved[unknown], truth.admissible_policy()[unknown]) and np.allclose(moved.sum(1), 1)
    actions = np.zeros(few.n_states, dtype=int)
    assert (transfer(actions, few, truth)[known, 0] == 1).all()
    with pytest.raises(ValueError, match="policy"): transfer(moved, few, truth)
    with pytest.raises(ValueError, match="3 actions there, 4 here"):
        transfer(np.zeros(1), build_mdp(GOOD, threshold=1, n_actions=3), truth)


def test_rollouts_of_a_rebuilt_mdp_keep_their_clusters():
    truth = small_truth()
    first = build_mdp(trajectories(truth.rollout(truth.admissible_policy(), 300, seed=2)), threshold=30, n_actions=4)
    table = trajectories(first.rollout(first.expert_policy, 2000, seed=3), first.labels)
    second = build_mdp(table, threshold=5, n_actions=4)
    assert set(second.labels) <= set(first.labels)
    policy = second.policy_iteration()[1]
    assert truth.evaluate(transfer(policy, second, truth)).value > 0
    with pytest.raises(ValueError, match="have no label"):
        trajectories(first.rollout(first.expert_policy, 20, seed=3), first.labels[:2])


def test_episodes_that_hold_no_states_are_refused():
    from medsim.data.episodes import Episodes

    with pytest.raises(ValueError, match='no feature "state"'): trajectories(Episodes.example(5, 3))


# ---- the round trip through the official tables


@pytest.fixture(scope="module")
def official() -> TabularMDP:
    try:
        from medsim.envs.icu_sepsis import load_official

        return load_official()
    except ImportError as error:
        pytest.skip(f"the official tables of ICU-Sepsis cannot be loaded: {error}")


def test_round_trip(official):
    episodes = official.rollout(official.admissible_policy(), 20_812, seed=0)
    built = build_mdp(trajectories(episodes), threshold=20, strict=True)
    assert 705 <= built.live.sum() <= 712 and 2195 <= built.meta["pairs"] <= 2225
    assert abs(built.evaluate(built.uniform_policy()).value - 0.780) < 0.006
    policy = built.policy_iteration()[1]
    assert 0.88 < built.evaluate(policy).value < 0.91
    assert abs(official.evaluate(transfer(policy, built, official)).value - 0.85) < 0.01


def test_the_published_distinct_rows_suffice(official):
    episodes = official.rollout(official.admissible_policy(), 20_812, seed=0)
    built = build_mdp(trajectories(episodes), threshold=1)
    several = (built.admissible[built.live].sum(1) > 1).sum()
    assert len(built.rows) == built.meta["pairs"] + several + 1


# ---- records


def small_mdp(store, **options):
    from medsim.data.cohorts import sepsis3
    from medsim.envs.states import mdp_from_store

    return mdp_from_store(store, sepsis3(store), **{"n_states": 20, "threshold": 4, **options})


def check_small(mdp: TabularMDP, outcome: str) -> None:
    stays, blocks = mdp.meta["stays"], mdp.meta["blocks"]
    assert stays > 40 and blocks > 400 and mdp.meta["gaps"] == 0 and mdp.meta["episodes"]["outcome"] == outcome
    assert mdp.n_actions == 25 and mdp.action_spec.treatments == ("fluids", "vasopressor")
    assert mdp.live.sum() > 5 and mdp.centroids.shape == (mdp.n_states, len(mdp.meta["features"]))
    assert np.isfinite(mdp.sofa).all() and (mdp.sofa[mdp.live] > 0).all()


@pytest.mark.parametrize("name", ["mimic3_store", "mimic4_store", "sample_store"])
def test_mdp_from_a_store(name, request):
    from medsim.data.cohorts import sepsis3

    store = request.getfixturevalue(name)
    mdp = small_mdp(store)
    check_small(mdp, "90d")
    exact = small_mdp(store, threshold=0)
    value, cohort = exact.evaluate(exact.expert_policy), sepsis3(store).stays
    died = store.stays.set_index("stay_id").death_h[cohort.stay_id] <= 90 * 24
    assert np.isclose(value.value, 1 - died.mean(), atol=1e-10)
    assert np.isclose(value.length, exact.meta["blocks"] / len(cohort), atol=1e-10)


def test_the_same_seed_gives_the_same_mdp_and_the_outcome_may_be_chosen(sample_store):
    one, two = (small_mdp(sample_store, outcome="hospital") for _ in range(2))
    assert np.array_equal(dense(one), dense(two)) and one.meta == two.meta
    assert one.meta["episodes"]["outcome"] == "hospital"


def test_a_store_too_small_says_so(sample_store):
    with pytest.raises(ValueError, match="the largest count is"): small_mdp(sample_store, threshold=1000)
    with pytest.raises(ValueError, match=r"n_states=750: the training stays hold \d+ different states"):
        small_mdp(sample_store, n_states=750)


def test_an_empty_cohort_is_named(sample_store):
    from dataclasses import replace

    from medsim.data.cohorts import sepsis3
    from medsim.envs.states import mdp_from_store

    cohort = sepsis3(sample_store)
    with pytest.raises(ValueError, match="has no stays"):
        mdp_from_store(sample_store, replace(cohort, stays=cohort.stays[:0]))


def test_states_know_nothing_of_their_own_action(mimic4_store):
    "The doses of a block are in its action, and in the state only of the next."
    from medsim.data.cohorts import sepsis3
    from medsim.data.timeline import decision_grid, states
    from medsim.data.treatments import treatments
    from medsim.envs.states import Recent

    onsets = sepsis3(mimic4_store).stays
    windows = onsets.merge(mimic4_store.stays[["stay_id", "out_h"]], on="stay_id").assign(start_h=0.0)
    grid = decision_grid(windows.assign(end_h=np.minimum(windows.out_h, 48)).query("end_h > 0"), 4.0)
    known, _ = states(mimic4_store, grid, (Recent("vasopressor", "vasopressor"), Recent("fluid")))
    given = treatments(mimic4_store, grid)
    later = grid.stay_id.eq(grid.stay_id.shift()).to_numpy()
    assert np.allclose(known[later, 0], given.vasopressor.shift()[later], atol=1e-5)
    assert np.allclose(known[later, 1], 4 * given.fluid.shift()[later], atol=1e-4)


def test_the_two_numberings_of_actions():
    from medsim.data.actions import SepsisGrid
    from medsim.envs.mdp import FLUIDS_BY_VASOPRESSORS
    from medsim.envs.states import fluids_by_vasopressor, swap_ids

    every, grid = np.arange(25), SepsisGrid((0.1, 0.2, 0.3), (10.0, 20.0, 30.0))
    vasopressor, fluid = grid.decode(every)
    assert np.array_equal(swap_ids(every), 5 * fluid + vasopressor) and np.array_equal(swap_ids(swap_ids(every)), every)
    assert np.array_equal(FLUIDS_BY_VASOPRESSORS.decode(swap_ids(every)), np.stack([fluid, vasopressor], -1))
    doses = fluids_by_vasopressor(grid).decode(swap_ids(every))
    assert np.allclose(doses, np.stack(grid.dose(every)[::-1], -1))
    for wrong in ([25], [-1], [0.5]):
        with pytest.raises(ValueError, match="0 to 24"): swap_ids(wrong)


def test_clusters_rest_on_training_stays():
    from dataclasses import replace

    from medsim.data.episodes import Episodes
    from medsim.envs.states import as_states, cluster_states

    toys = Episodes.example(60, 6, seed=1)
    test = (toys.ids.fold != "train").to_numpy()[:, None, None]
    other = replace(toys, obs=np.where(test, toys.obs + 3, toys.obs))
    assert np.array_equal(cluster_states(toys, 5)[1], cluster_states(other, 5)[1])
    train = as_states(toys, 5, folds=("train",)).table
    assert set(train.stay_id) == set(toys.ids.stay_id[toys.ids.fold == "train"])
    full = as_states(toys, 5)
    assert len(full.table) == toys.mask.sum() and full.mdp(threshold=1).meta["clusters"] == 5
    with pytest.raises(ValueError, match="folds"): as_states(toys, 5, folds=("valid",))
    with pytest.raises(ValueError, match="died"): as_states(replace(toys, ids=toys.ids.drop(columns="died")), 5)
