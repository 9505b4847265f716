"Tabular learners: they solve what has a known answer, repeat themselves exactly, step as torch does; search resumes."

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("numba", reason="the tabular learners need the extra medsim[tabular]")

from medsim.agents import tabular_kernels as kernels
from medsim.agents.tabular import DQN, PPO, RANGES, SAC, QLearning, Sarsa, search, setting, train
from medsim.envs.mdp import TabularMDP

QUICK = {
    "q": QLearning(0.02),
    "sarsa": Sarsa(0.02),
    "bug": Sarsa(0.02, published_bug=True),
    "dqn": DQN(0.02, buffer_size=2_000, learning_starts=100, target_frequency=20, tau=0.2),
    "ppo": PPO(0.03, n_steps=64, target_kl=0.1, update_epochs=4),
    "ppo_all": PPO(0.03, True, n_steps=60, n_minibatches=3, target_kl=0.1, clip_value=True, normalise_advantage=False),
    "sac": SAC(0.02, 0.02, buffer_size=2_000, learning_starts=100, update_frequency=2, target_frequency=20, tau=0.2,
               alpha=0.01),
    "sac_auto": SAC(0.02, 0.02, buffer_size=500, learning_starts=50, autotune=True, update_frequency=4, batch_size=16),
}
LEARN = [name for name in QUICK if name not in ("bug", "sac_auto")]


def wards() -> TabularMDP:
    """Three states, three actions, death 3, survival 4, end 5. In state s action s is right: on with .9, else death.

    A wrong admissible action leads on with .3, stays with .3 and kills with .4. Action 2 is inadmissible in state 0.
    The best policy survives with .9 ** 3.
    """
    p = np.zeros((6, 3, 6))
    for s, a in product(range(3), range(3)):
        on = s + 1 if s < 2 else 4
        p[s, a, [on, 3]] = 0.9, 0.1
        if a != s: p[s, a, [on, s, 3]] = 0.3, 0.3, 0.4
    admissible = np.ones((6, 3), bool)
    admissible[0, 2] = False
    p[0, 2] = p[0, :2].mean(0)
    p[3:, :, 5] = 1
    return TabularMDP.from_dense(p, np.eye(6)[4], np.eye(6)[0], admissible)


@pytest.fixture(scope="module")
def mdp() -> TabularMDP:
    return wards()


def quickly(mdp: TabularMDP, name: str, **how):
    return train(mdp, QUICK[name], **{"episodes": 600, "progress": False, "checkpoints": 3, "n_jobs": 1} | how)


def test_the_answer_is_known(mdp):
    values, _ = mdp.value_iteration()
    assert np.isclose(mdp.initial @ values, 0.9**3)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", LEARN)
def test_solves(mdp, name, masked):
    result = quickly(mdp, name, episodes=6_000, seed=[0, 1], masked=masked)
    assert result.policy[:, :3].argmax(2).tolist() == [[0, 1, 2]] * 2
    assert np.allclose(result.history.groupby("seed").value.last(), 0.9**3)
    if result.stochastic is not None:
        assert result.history.stochastic_value.iloc[-1] > 0.9**3 - 0.05
        assert np.allclose(result.stochastic.sum(2), 1) and (not masked or (result.stochastic[:, 0, 2] == 0).all())


@pytest.mark.parametrize("name", QUICK)
def test_same_seed_same_numbers_in_pieces_and_in_company(mdp, name):
    one = quickly(mdp, name, seed=3)
    pieces = quickly(mdp, name, seed=3, checkpoints=37)
    company = quickly(mdp, name, seed=[7, 3, 0], n_jobs=2)
    other = quickly(mdp, name, seed=4)
    for again, k in ((pieces, 0), (company, 1)):
        assert (again.returns[k] == one.returns[0]).all() and (again.lengths[k] == one.lengths[0]).all()
    assert (pieces.policy == one.policy).all() and (company.policy[1] == one.policy).all()
    assert (other.lengths != one.lengths).any()
    if one.stochastic is not None:
        assert (pieces.stochastic == one.stochastic).all() and (company.stochastic[1] == one.stochastic).all()


def test_history(mdp):
    result = quickly(mdp, "q", seed=[5, 6], checkpoints=4)
    h = result.history
    assert list(h.columns) == ["seed", "episode", "steps", "mean_return", "mean_length", "value", "stochastic_value"]
    assert h.seed.tolist() == [5] * 4 + [6] * 4 and h.episode.tolist() == [150, 300, 450, 600] * 2
    assert np.allclose(h.mean_return.iloc[5], result.returns[1, 150:300].mean())
    assert h.steps.iloc[-1] == result.lengths[1].sum() and h.stochastic_value.isna().all()
    last = [mdp.evaluate(p).value for p in result.policy]
    assert np.allclose(h.groupby("seed").value.last(), last)
    assert np.isclose(mdp.evaluate(result.policy[0]).value, last[0])


def test_a_seed_or_a_list_of_one(mdp):
    assert quickly(mdp, "q", seed=np.int64(0)).policy.shape == (6, 3)
    assert quickly(mdp, "q", seed=[0]).policy.shape == (1, 6, 3)


def test_the_published_bug_is_another_algorithm(mdp):
    right, bug = (quickly(mdp, name, episodes=4_000, seed=[0, 1, 2]) for name in ("sarsa", "bug"))
    assert (right.returns != bug.returns).any()
    assert bug.history.mean_return.tail(1).item() < right.history.mean_return.tail(1).item() - 0.1


def test_unmasked_takes_inadmissible_actions(mdp):
    w = kernels.world(mdp, masked=False)
    assert np.diff(w.first).tolist() == [3, 3, 3, 0, 0, 0]
    assert np.diff(kernels.world(mdp).first).tolist() == [2, 3, 3, 0, 0, 0]


# ---- kernels


def test_adam_is_torchs():
    rng, n = np.random.default_rng(1), 30
    theirs = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    whole, part, m, k = np.zeros(n), np.zeros(n), kernels.moments(n), kernels.waking(n)
    optimiser = torch.optim.Adam([theirs], lr=0.02)
    for t in range(3_000):
        at = int(rng.integers(n)) if t < 1_000 else int(rng.geometric(0.3)) % n  # later some sleep for long
        g = np.zeros(n)
        g[at] = rng.standard_normal() * 10 ** rng.uniform(-5, 2)
        theirs.grad = torch.tensor(g)
        optimiser.step()
        kernels.adam(whole, g, m, 0.02, 1e-8)
        kernels.adam_at(part, at, g[at], k, 0.02, 1e-8)
        assert max(np.abs(x - theirs.detach().numpy()).max() for x in (whole, part)) < 1e-12


def test_dense_adam_forgets_without_slowing_down():
    w, m = np.zeros(4), kernels.moments(4)
    kernels.adam(w, np.ones(4), m, 0.1, 1e-8)
    for _ in range(20_000): kernels.adam(w, np.zeros(4), m, 0.1, 1e-8)
    assert (m.mean == 0).all() and np.isfinite(w).all()


def test_draws_follow_the_rows(mdp):
    w, rng = kernels.world(mdp), np.random.default_rng(0)
    for pair in range(len(w.action)):
        seen = np.bincount([kernels.draw(w, w.row[pair], rng) for _ in range(4_000)], minlength=6) / 4_000
        state = np.searchsorted(w.first, pair, side="right") - 1
        row = np.zeros(6)
        a, b = mdp.rows.indptr[mdp.row_of[state, w.action[pair]] + np.arange(2)]
        row[mdp.rows.next_state[a:b]] = mdp.rows.prob[a:b]
        assert np.abs(seen - row).max() < 5 * 0.5 / 4_000**0.5
    assert all(kernels.begin(w, rng) == 0 for _ in range(20))


# ---- bad input


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [(QLearning, "learning_rate", 0), (QLearning, "epsilon_end", 1.2), (Sarsa, "exploration_fraction", -0.1),
     (DQN, "batch_size", 2.5), (DQN, "tau", float("nan")), (PPO, "n_minibatches", 501), (PPO, "gae_lambda", "high"),
     (PPO, "anneal", 0.5), (SAC, "alpha", 0), (SAC, "autotune", "yes"), (SAC, "buffer_size", True)],
)
def test_a_bad_setting_is_named(config, field, value):
    with pytest.raises(ValueError, match=rf"{config.__name__}: {field}="):
        config(**{field: value})


@pytest.mark.parametrize(
    ("how", "message"),
    [({"episodes": 0}, "episodes=0"), ({"checkpoints": 0}, "checkpoints=0"), ({"seed": []}, "seed"),
     ({"seed": [1, 1]}, "seed")],
)
def test_a_bad_argument_is_named(mdp, how, message):
    with pytest.raises(ValueError, match=message): quickly(mdp, "q", **how)


def test_a_config_is_needed(mdp):
    with pytest.raises(TypeError, match="config"): train(mdp, "q")  # type: ignore[arg-type]


def test_without_numba_the_extra_is_named(tmp_path: Path):
    code = "import sys; sys.modules.update(numba=None)"
    code += "\ntry: import medsim.agents.tabular\nexcept ImportError as e: print(e)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "medsim[tabular]" in said


def test_convergence_needs_two_windows(mdp):
    with pytest.raises(ValueError, match="window=400"): quickly(mdp, "q").converged(400)


def test_convergence_by_hand(mdp):
    result = quickly(mdp, "q", seed=[0, 1])
    curve = np.r_[np.zeros(300), np.ones(300)]
    made = replace(result, returns=np.stack([curve, np.ones(600)]), lengths=np.full((2, 600), 2))
    out = made.converged(window=100).set_index("seed")
    assert out.episodes[0] == 400 and out.episodes[1] == 100 and out.episodes["all"] == 400
    assert out.steps[0] == 800 and np.isclose(out.mean_return[1], 1)


# ---- search


HOW = dict(episodes=200, seeds=2, progress=False, n_jobs=1)


def test_search_resumes_to_the_same_result(mdp, tmp_path: Path):
    file = tmp_path / "q.jsonl"
    search(mdp, QLearning, 2, file=file, **HOW)
    with file.open("a") as out: out.write('{"setting": 2, "score": 0.')  # cut off while it was written
    resumed = search(mdp, QLearning, 4, file=file, **HOW)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["setting"] for line in lines[1:]) == [0, 1, 2, 3]
    pd.testing.assert_frame_equal(resumed, search(mdp, QLearning, 4, **HOW))
    assert resumed.score.is_monotonic_decreasing and "learning_rate" in resumed
    assert len(search(mdp, QLearning, 3, file=file, **HOW)) == 3


def test_search_in_processes_gives_the_same(mdp):
    here, there = (search(mdp, QLearning, 2, **HOW | {"n_jobs": n}) for n in (1, 2))
    pd.testing.assert_frame_equal(here, there)


def test_search_refuses_another_searchs_file(mdp, tmp_path: Path):
    file = tmp_path / "q.jsonl"
    search(mdp, QLearning, 1, file=file, **HOW)
    before = file.read_text()
    other = HOW | {"episodes": 9}
    with pytest.raises(ValueError, match="q.jsonl.*episodes"): search(mdp, QLearning, 1, file=file, **other)
    with pytest.raises(ValueError, match="mdp"): search(mdp.perturb(1.0), QLearning, 1, file=file, **HOW)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("how", "message"),
    [({"ranges": {"speed": ("log", 1, 2)}}, "speed"), ({"ranges": {"learning_rate": ("log", 0, 2)}}, "learning_rate"),
     ({"ranges": {"learning_rate": ("gauss", 1, 2)}}, "learning_rate"), ({"seeds": 0}, "seeds=0")],
)
def test_search_names_what_is_wrong(mdp, how, message):
    with pytest.raises(ValueError, match=message): search(mdp, QLearning, 1, **HOW | how)


@pytest.mark.parametrize("algorithm", RANGES)
def test_settings_keep_to_their_ranges(algorithm):
    for k in range(200):
        made = setting(algorithm, RANGES[algorithm], 0, k)
        for name, (_, low, high) in RANGES[algorithm].items(): assert low <= getattr(made, name) <= high
    assert setting(algorithm, RANGES[algorithm], 0, 7) == setting(algorithm, RANGES[algorithm], 0, 7)


# ---- the official tables


def test_learns_on_the_official_tables():
    pytest.importorskip("icu_sepsis", reason="the official tables need the extra medsim[icu-sepsis]")
    from medsim.envs.icu_sepsis import load_official

    official = load_official()
    result = train(official, PPO(), episodes=10_000, seed=[0, 1], checkpoints=1, progress=False)
    assert result.history.value.mean() > 0.81  # chance .780
    assert (result.policy[:, official.live] * official.admissible[official.live]).sum() == 2 * official.live.sum()
