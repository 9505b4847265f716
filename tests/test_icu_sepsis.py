"ICU-Sepsis: the published numbers, the published courses bit for bit, and the batch that goes faster."

import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import medsim  # noqa: F401  (registers the ids)
from medsim.envs.icu_sepsis import ICUSepsisEnv, ICUSepsisVectorEnv, InadmissibleAction, load_official, load_tables
from medsim.envs.mdp import TabularMDP
from medsim.envs.registration import page


@pytest.fixture(scope="session")
def official() -> TabularMDP:
    try:
        return load_official()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def peer():
    "Makes the published environment without Gymnasium's wrappers for checks."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("icu_sepsis", reason="the extra icu-sepsis is not installed")
    return lambda **keywords: gym.make("Sepsis/ICU-Sepsis-v2", disable_env_checker=True, **keywords)


@pytest.fixture
def small() -> TabularMDP:
    "Two live states, three actions; nothing of the official tables."
    p = np.zeros((5, 3, 5))
    p[0] = [[0.2, 0.5, 0.1, 0.2, 0], [0.6, 0.1, 0.2, 0.1, 0], [0.1, 0.1, 0.4, 0.4, 0]]
    p[1] = [[0.3, 0.3, 0.2, 0.2, 0], [0.1, 0.2, 0.5, 0.2, 0], [0.2, 0.2, 0.3, 0.3, 0]]
    p[2:, :, 4] = 1
    admissible = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]], bool)
    return TabularMDP.from_dense(p, np.array([0, 0, 0, 1.0, 0]), np.array([0.7, 0.3, 0, 0, 0]), admissible).completed()


# The published numbers


def test_sizes(official):
    n = official.admissible[official.live].sum(1)
    assert official.live.sum() == 713 and n.sum() == 2238 and np.median(n) == 4
    assert n.mean() == pytest.approx(3.138850, abs=1e-6)
    histogram = {1: 237, 2: 40, 3: 32, 4: 317, 5: 35, 6: 24, 7: 11, 8: 9, 9: 1, 10: 2, 11: 2, 12: 1, 13: 2}
    assert dict(zip(*map(np.ndarray.tolist, np.unique(n, return_counts=True)), strict=True)) == histogram
    assert official.centroids.shape == (716, 47) and official.sofa.shape == (716,)
    assert np.flatnonzero(official.terminal).tolist() == [713, 714, 715]


@pytest.mark.parametrize(("name", "value", "length"), [
    ("uniform", 0.780071, 9.462296), ("admissible", 0.780071, 9.462296), ("expert", 0.781845, 9.237950),
    ("restricted", 0.782014, 9.223030), ("optimal", 0.875142, 10.991744),
])
def test_baselines(official, name, value, length):
    policy = {"uniform": official.uniform_policy, "admissible": official.admissible_policy,
              "expert": lambda: official.expert_policy, "restricted": lambda: official.restrict(official.expert_policy),
              "optimal": lambda: official.policy_iteration()[1]}[name]()
    x = official.evaluate(policy)
    assert (x.value, x.length) == (pytest.approx(value, abs=1e-6), pytest.approx(length, abs=1e-6))


def test_other_exact_numbers(official):
    assert official.initial @ official.policy_iteration(0.99)[0] == pytest.approx(0.801334, abs=1e-6)
    deadly = official.completed("terminate").evaluate(official.uniform_policy())
    assert (deadly.value, deadly.length) == (pytest.approx(0.008360, abs=1e-6), pytest.approx(1.094725, abs=1e-6))


def test_share_of_the_experts_decisions_that_are_inadmissible(official):
    expert = official.evaluate(official.expert_policy)
    outside = (official.expert_policy * ~official.admissible).sum(1)
    share = expert.occupancy @ outside / expert.length
    log = official.rollout(official.expert_policy, 20_000, seed=0)
    state = log.obs[..., 0].astype(int)
    drawn = ~official.admissible[state, log.action][log.mask]
    assert share == pytest.approx(0.121, abs=5e-4) and drawn.mean() == pytest.approx(share, abs=0.004)


def test_admissible_actions_follow_from_the_rows(official, tmp_path):
    "Without the text file beside it, the archive alone gives the same."
    from importlib.util import find_spec

    path = Path(find_spec("icu_sepsis").submodule_search_locations[0]) / "envs" / "assets" / "dynamics.npz"
    (tmp_path / "dynamics.npz").symlink_to(path)
    alone = TabularMDP.from_npz(tmp_path / "dynamics.npz")
    np.testing.assert_array_equal(alone.admissible[alone.live], official.admissible[official.live])


# Bit for bit

GOLDEN = {0: [435, 180, 47, 30, 625, 714], 1: [329, 713], 2: [164, 164, 714], 42: [559, 352, 640, 640, 71, 714]}


@pytest.mark.parametrize("seed", GOLDEN)
def test_golden_trajectories(official, seed):
    env = ICUSepsisEnv(official)
    states, over, k = [env.reset(seed=seed)[0]], False, 0
    while not over:
        state, reward, over, truncated, _ = env.step((7 * k + seed) % 25)
        assert not truncated and reward == (state == 714)
        states, k = [*states, state], k + 1
    assert states == GOLDEN[seed]


@pytest.mark.parametrize("strategy", ["mean", "terminate"])
def test_courses_are_those_of_the_published_environment(official, peer, strategy):
    "Three hundred stays in a row from one seed, infos and all."
    ours = ICUSepsisEnv(official, inadmissible_action_strategy=strategy)
    theirs = peer(inadmissible_action_strategy=strategy)
    rng = np.random.default_rng(0)
    for stay in range(300):
        seed = 7 if stay == 0 else None
        (a, info_a), (b, info_b) = ours.reset(seed=seed), theirs.reset(seed=seed)
        over = False
        while not over:
            assert a == b and info_a["admissible_actions"] == list(info_b["admissible_actions"])
            assert (info_a["state_vector"] == info_b["state_vector"]).all()
            assert info_a["sofa_score"] == info_b["sofa_score"] and set(info_a) == set(info_b)
            action = int(rng.integers(25))
            a, reward, over, _, info_a = ours.step(action)
            b, same, ended, _, info_b = theirs.step(action)
            assert (reward, over) == (same, ended)
        assert a == b


# The environment as Gymnasium has it


def test_by_name(official):
    env = gym.make("medsim/ICUSepsis-v0", inadmissible_action_strategy="terminate")
    check_env(env.unwrapped, skip_render_check=True)
    assert env.unwrapped.mdp is official and env.unwrapped.strategy == "terminate"
    rows = gym.make_vec("medsim/ICUSepsis-v0", num_envs=3)
    assert rows.num_envs == 3 and rows.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert "## Action Space" in page("medsim/ICUSepsis-v0")


def test_small_tables_need_no_package(small):
    check_env(ICUSepsisEnv(small), skip_render_check=True)
    check_env(ICUSepsisEnv(small, inadmissible_action_strategy="terminate"), skip_render_check=True)
    assert set(ICUSepsisEnv(small).reset(seed=0)[1]) == {"admissible_actions"}


def test_csv_folder(small, tmp_path):
    small.to_csv(tmp_path / "tables")
    env = ICUSepsisEnv(tables=tmp_path / "tables")
    assert env.mdp is load_tables(tmp_path / "tables") and env.mdp.n_states == 5
    with pytest.raises(FileNotFoundError, match="nowhere"): ICUSepsisEnv(tables=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not both"): ICUSepsisEnv(small, tables=tmp_path / "tables")


def test_infos_are_the_callers_own(official):
    env = ICUSepsisEnv(official)
    _, info = env.reset(seed=5)
    known = list(info["admissible_actions"])
    info["admissible_actions"].append(99)
    info["state_vector"][:] = np.nan
    env.action_masks()[:] = False
    _, again = env.reset(seed=5)
    assert again["admissible_actions"] == known and np.isfinite(again["state_vector"]).all()
    assert np.flatnonzero(env.action_masks()).tolist() == known


def test_faults_of_one(small):
    env = ICUSepsisEnv(small, inadmissible_action_strategy="raise_exception")
    with pytest.raises(RuntimeError, match="call reset"): env.step(0)
    with pytest.raises(RuntimeError, match="call reset"): env.action_masks()
    with pytest.raises(ValueError, match="options"): env.reset(options={"state": 3})
    env.reset(seed=0)
    for bad in (3, -1, 0.5, "x", None):
        with pytest.raises(ValueError, match="needs an integer in 0 to 2"): env.step(bad)
    state, forbidden = env.state, int(np.flatnonzero(~env.action_masks())[0])
    with pytest.raises(InadmissibleAction, match=rf"state {state}: action {forbidden} .* admissible are"):
        env.step(forbidden)
    assert env.state == state  # nothing moved
    while not env.step(int(np.flatnonzero(env.action_masks())[0]))[2]: pass
    with pytest.raises(RuntimeError, match="call reset"): env.step(0)
    with pytest.raises(ValueError, match="choose one of mean, terminate, raise_exception"):
        ICUSepsisEnv(small, inadmissible_action_strategy="ignore")


def test_termination_draws_nothing(small):
    "An inadmissible action leaves the generator where it was."
    a, b = (ICUSepsisEnv(small, inadmissible_action_strategy="terminate") for _ in range(2))
    a.reset(seed=3)
    b.reset(seed=3)
    state, reward, over, *_ = a.step(int(np.flatnonzero(~a.action_masks())[0]))
    assert (state, reward, over) == (2, 0.0, True)
    assert [a.reset()[0] for _ in range(20)] == [b.reset()[0] for _ in range(20)]


# The batch


def test_batch_against_exact_values(small):
    n, steps = 2000, 400
    rows = ICUSepsisVectorEnv(n, small)
    state, _ = rows.reset(seed=0)
    rng, ended, alive, length, lengths = np.random.default_rng(1), 0, 0, np.zeros(n, int), []
    firsts = [state]
    for _ in range(steps):
        assert rows.action_masks().shape == (n, 3)
        state, reward, done, truncated, info = rows.step(rng.integers(3, size=n))
        length += 1
        assert not truncated.any() and small.live[state].all()  # begun anew in the same step
        if done.any():
            assert (info["_final_obs"] == done).all() and small.terminal[info["final_obs"][done]].all()
            assert (reward == (info["final_obs"] == 3)).all()
            lengths.append(length[done])
            firsts.append(state[done])
        ended, alive, length = ended + done.sum(), alive + reward.sum(), np.where(done, 0, length)
    x = small.evaluate(small.uniform_policy())
    assert abs(alive / ended - x.value) < 4 * np.sqrt(x.value * (1 - x.value) / ended)
    all_lengths, first = np.concatenate(lengths), np.concatenate(firsts)
    assert all_lengths.mean() == pytest.approx(x.length, rel=0.02)  # those cut at the end are few
    assert all_lengths.std() == pytest.approx(x.length_sd, rel=0.02)
    assert abs((first == 0).mean() - 0.7) < 4 * np.sqrt(0.21 / len(first))


def test_batch_strategies(small):
    deadly = ICUSepsisVectorEnv(64, small, inadmissible_action_strategy="terminate")
    deadly.reset(seed=0)
    bad = ~deadly.action_masks()[:, 0]
    _, reward, done, _, info = deadly.step(np.zeros(64, dtype=int))
    assert done[bad].all() and (info["final_obs"][bad] == 2).all() and (reward[bad] == 0).all() and not done.all()
    strict = ICUSepsisVectorEnv(64, small, inadmissible_action_strategy="raise_exception")
    state, _ = strict.reset(seed=0)
    with pytest.raises(InadmissibleAction, match=f"row {int(bad.argmax())}, state 1: action 0"):
        strict.step(np.zeros(64, dtype=int))
    assert (strict.state == state).all()
    strict.step(strict.action_masks().argmax(1))


def test_same_seed_same_rows(small):
    def run(seed):
        rows, rng = ICUSepsisVectorEnv(50, small), np.random.default_rng(0)
        return [rows.reset(seed=seed)[0], *(rows.step(rng.integers(3, size=50))[0] for _ in range(30))]

    assert np.array_equal(run(1), run(1)) and not np.array_equal(run(1), run(2))


def test_rows_are_the_callers_own(small):
    rows = ICUSepsisVectorEnv(8, small)
    state, _ = rows.reset(seed=0)
    state[:] = 99
    rows.action_masks()[:] = False
    state, *_ = rows.step(np.zeros(8, dtype=int))
    state[:] = 99
    rows.step(np.zeros(8, dtype=int))
    assert small.admissible.any(1).all()


def test_faults_of_many(small):
    rows = ICUSepsisVectorEnv(4, small)
    with pytest.raises(RuntimeError, match="call reset"): rows.step(np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match="give one integer"): rows.reset(seed=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="options"): rows.reset(options={"a": 1})
    rows.reset(seed=0)
    for bad in (np.zeros(3, dtype=int), np.zeros(4), np.array([0, 1, 2, 3]), np.array([0, 0, 0, -1])):
        with pytest.raises(ValueError, match="actions: needs 4 integers in 0 to 2"): rows.step(bad)
    with pytest.raises(ValueError, match="num_envs=0"): ICUSepsisVectorEnv(0, small)


# Without the package


def test_without_the_official_package():
    "Everything imports, the id is registered, and only making it says what is missing."
    program = (
        "import sys, importlib.abc\n"
        "class Hidden(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('icu_sepsis', 'gym'): raise ModuleNotFoundError(name)\n"
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'icu_sepsis' else real(name, *a)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "import gymnasium, medsim\n"
        "from medsim.envs.tabular import TabularMDP, build_mdp\n"
        "import medsim.envs.icu_sepsis\n"
        "try: gymnasium.make('medsim/ICUSepsis-v0')\n"
        "except ImportError as e: print(e)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    assert "pip install 'medsim[icu-sepsis]'" in run.stdout


def test_nothing_official_is_imported(official):
    "Reading the tables does not run the package (nor the unmaintained gym that it imports)."
    program = ("import sys\nfrom medsim.envs.icu_sepsis import load_official\nload_official()\n"
               "print([m for m in sys.modules if m.split('.')[0] in ('gym', 'icu_sepsis')])")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
