"A treated environment as a data set: exact probabilities, whole horizons, the same data for a seed, on the grid too."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.data.episodes import Episodes
from medsim.envs.registration import sepsis
from medsim.envs.rollout import rollout, rollout_on_grid, uniform_policy
from medsim.envs.vector import TreatmentVectorEnv
from medsim.sim.glucose import Glucose
from medsim.sim.ventilation import Ventilation

torch.set_num_threads(1)
FEW = sepsis().select([0, 1, 2])
LOW = -0.5  # of a normalised state
SHORT = dict(horizon_h=6.0, budget=3, dt_min=0.5, dt_max=3.0, backend="pinn")


class Biased:
    "Action i of n with a probability in proportion to i + 1, or in the opposite order where pressure is low."

    def __init__(self, n): self.p = torch.arange(1, n + 1, dtype=torch.float64) / (n * (n + 1) / 2)

    def table(self, obs): return torch.where(obs[:, :1] < LOW, self.p.flip(0), self.p)

    def act(self, obs, *, deterministic=False, generator=None):
        return torch.multinomial(self.table(obs), 1, generator=generator).squeeze(-1)

    def log_prob(self, obs, action): return self.table(obs).gather(1, action[:, None]).squeeze(-1).log()


class Beta:
    "Doses with the density 2 a."

    def __init__(self, m): self.m = m

    def act(self, obs, *, deterministic=False, generator=None):
        return torch.rand(len(obs), self.m, generator=generator, dtype=torch.float64).sqrt()

    def log_prob(self, obs, action): return (2 * action).log().sum(-1)


class Steady:
    "Doses that follow from the observation's states, by a random matrix; no chance."

    def __init__(self, d, m, seed=0, scale=1.0):
        gen = torch.Generator().manual_seed(seed)
        self.weight, self.scale = 0.3 * torch.randn(d, m, generator=gen), scale

    def act(self, obs, *, deterministic=False, generator=None):
        return self.scale * torch.sigmoid(obs[:, : len(self.weight)] @ self.weight)

    def log_prob(self, obs, action): return torch.zeros(len(obs))


def env(condition=FEW, copies=2, **keywords): return TreatmentVectorEnv(condition, copies, **{**SHORT, **keywords})


# ---- probabilities


def test_probabilities_are_the_policy_s():
    rows = env(copies=100, discrete=True)
    policy = Biased(125)
    e = rollout(rows, policy, 3, seed=1)
    assert e.action_spec.discrete and e.action_spec.n == 125 and e.mask.sum() == 300 * 3 * 3
    ill = e.obs[..., 0] < LOW
    p = policy.p.numpy()
    assert np.allclose(e.behaviour_prob, np.where(ill, p[::-1][e.action], p[e.action]), rtol=1e-6)
    for chosen, table in ((ill, p[::-1]), (~ill, p)):  # and the actions come as often as they say
        n, counts = chosen.sum(), np.bincount(e.action[chosen], minlength=125)
        assert n > 200
        expected = n * table
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi2 - 124) < 5 * math.sqrt(2 * 124) + 5


def test_densities_and_the_uniform_policy():
    rows = env()
    e = rollout(rows, Beta(3), seed=0)
    assert np.allclose(e.behaviour_prob, np.prod(2 * e.action, -1), rtol=1e-5) and e.behaviour_prob.max() > 1
    assert (rollout(rows, uniform_policy(rows), seed=0).behaviour_prob == 1).all()
    grid = env(discrete=True, timing="adaptive")
    e = rollout(grid, uniform_policy(grid), seed=0)
    assert np.allclose(e.behaviour_prob[e.mask], 1 / len(grid.batch.grid))


# ---- episodes


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["fixed", "adaptive", "priced"]), st.booleans(), st.sampled_from(["full", "partial"]),
       st.integers(0, 10**6))
def test_episodes_are_whole(timing, discrete, observation, seed):
    rows = env(timing=timing, discrete=discrete, observation=observation)
    e = rollout(rows, uniform_policy(rows), 2, seed=seed)
    assert len(e) == 12 and np.allclose(e.dt.sum(1), 6.0, atol=1e-4)
    assert e.terminated.any(1).all() and not e.truncated.any() and (e.terminated.sum(1) == 1).all()
    assert (e.cost >= 0).all() and (e.cost <= e.dt + 1e-5).all()
    assert np.allclose(e.physical("hours_left")[:, 0], 6.0, atol=1e-5) and np.allclose(e.final_obs[:, -2], 0)
    left = 6.0 - np.cumsum(e.dt, 1) + e.dt
    assert np.allclose(e.physical("hours_left")[e.mask], left[e.mask], atol=1e-4)
    if timing != "priced": assert np.allclose(e.physical("decisions_left")[:, 0], 3, atol=1e-5)
    assert e.ids.patient.tolist() == ["0", "0", "1", "1", "2", "2"] * 2
    assert (e.ids.groupby("subject_id").patient.nunique() == 1).all() and e.ids.stay_id.is_unique
    again = rollout(env(timing=timing, discrete=discrete, observation=observation), uniform_policy(rows), 2, seed=seed)
    assert again.data_hash() == e.data_hash()
    assert rollout(rows, uniform_policy(rows), 2, seed=seed).data_hash() == e.data_hash()  # of a used environment
    assert rollout(rows, uniform_policy(rows), 2, seed=seed + 1).data_hash() != e.data_hash()


@pytest.mark.parametrize("timing", ["adaptive", "priced"])  # priced: rows end at their own time, some twice meanwhile
def test_it_is_what_the_environment_shows(timing):
    "Replayed by hand: observations, rewards, costs, dt and the last observation."
    rows, twin = (env(timing=timing, observation="partial", copies=8, dt_max=6.0) for _ in range(2))
    e = rollout(rows, uniform_policy(rows), seed=5)
    obs, _ = twin.reset(seed=5)
    going = np.ones(24, bool)
    for t in range(e.mask.shape[1]):
        assert np.array_equal(e.mask[:, t], going) and np.allclose(e.obs[going, t], obs[going], atol=1e-6)
        action = np.where(going[:, None], e.action[:, t], 0.5)
        obs, reward, done, _, info = twin.step(action)
        for field, value in (("reward", reward), ("cost", info["cost"]), ("dt", info["dt"])):
            assert np.allclose(getattr(e, field)[going, t], value[going], rtol=1e-5, atol=1e-5)
        ended = going & done
        if ended.any(): assert np.allclose(e.final_obs[ended], info["final_obs"][ended], atol=1e-5)
        going &= ~done
    assert not going.any()


@pytest.mark.parametrize("discrete", [False, True])
def test_saved_and_read(tmp_path, discrete):
    rows = env(timing="adaptive", discrete=discrete, observation="partial")
    e = rollout(rows, uniform_policy(rows), seed=2)
    e.save(tmp_path / "kept")
    same = Episodes.load(tmp_path / "kept")
    assert same.data_hash() == e.data_hash() and same.action_spec == e.action_spec
    assert same.alignment["timing"] == "adaptive" and same.alignment["observation"] == "partial"
    assert {"reward", "behaviour_prob", "dt"} <= set(same.transitions()) and len(e.summary()) == 4


def test_features_and_doses_in_their_units():
    rows = env(copies=1, discrete=True, timing="adaptive")
    e = rollout(rows, uniform_policy(rows), seed=3)
    rows.reset_torch(3)
    y = FEW.to_physical(rows.batch.x)[:, 0].numpy()
    for j, q in enumerate(FEW.states):
        assert np.allclose(e.physical(q.name)[:, 0], np.clip(y[:, j], q.low, q.high), rtol=1e-4, atol=1e-3)
        assert e.units[q.name] == q.unit
    doses = e.action_spec.decode(e.action)
    grid = rows.batch.grid.numpy()[e.action]
    low, high = (np.array([getattr(t, end) for t in FEW.treatments]) for end in ("low", "high"))
    assert np.allclose(doses[..., :3], low + grid[..., :3] * (high - low)) and np.allclose(doses[..., 3], grid[..., 3])
    assert e.action_spec.treatments == ("fio2", "vasopressor", "fluid", "wait")
    assert (e.dt[e.mask] <= np.maximum(doses[..., 3][e.mask], 6.0)).all()


def test_partial_observations_are_carried():
    rows = env(observation="partial", copies=4)
    e = rollout(rows, uniform_policy(rows), seed=0)
    names = [q.name for q in FEW.states]
    assert e.feature_names == (*names, *(f"{n}_new" for n in names), *(f"{n}_since" for n in names), "hours_left",
                               "decisions_left")
    for n in names:
        new, since, value = (e.physical(k)[e.mask] for k in (f"{n}_new", f"{n}_since", n))
        assert set(np.round(new, 6)) <= {0.0, 1.0} and since.min() >= -1e-5 and since.max() <= 6.0 + 1e-5
        q = FEW.states[names.index(n)]
        assert value.min() >= q.low - 1e-3 and value.max() <= q.high + 1e-3
    full = rollout(env(copies=4), uniform_policy(rows), seed=0)  # the same patients, seen fully
    assert np.allclose(full.reward, e.reward) and not np.allclose(full.obs[..., :6], e.obs[..., :6])


@pytest.mark.parametrize("kind", [Glucose, Ventilation])
def test_other_conditions(kind):
    rows = TreatmentVectorEnv(kind.virtual(2), 2, horizon_h=1.0, budget=2, discrete=kind is Ventilation)
    e = rollout(rows, uniform_policy(rows), seed=0)
    for q in kind.virtual(1).states: assert np.isfinite(e.physical(q.name)[e.mask]).all() and e.units[q.name] == q.unit
    assert np.allclose(e.dt.sum(1), 1.0)


# ---- on the grid


@pytest.mark.parametrize("kind, horizon, step, tolerance", [("sepsis", 12.0, 4.0, 1e-3), ("glucose", 6.0, 1.5, 1e-3),
                                                            ("ventilation", 2.0, 0.5, 1e-3)])
def test_totals_on_the_grid_are_those_of_the_decisions(kind, horizon, step, tolerance):
    "A policy without chance, decisions at its own times; solver, no noise."
    condition = {"sepsis": FEW, "glucose": Glucose.virtual(3), "ventilation": Ventilation.virtual(3)}[kind]
    rows = TreatmentVectorEnv(condition, 1, timing="adaptive", horizon_h=horizon, budget=3, dt_min=horizon / 12,
                              dt_max=horizon / 2)
    policy = Steady(len(condition.states), rows.batch.action_size, scale=0.3 if kind == "glucose" else 1.0)
    a, b = rollout(rows, policy, seed=4), rollout_on_grid(rows, policy, step, seed=4)
    assert b.mask.all() and b.mask.shape[1] == round(horizon / step) and np.allclose(b.dt, step)
    assert not np.allclose(a.dt, a.dt[0, 0])
    assert np.allclose(a.reward.sum(1), b.reward.sum(1), rtol=tolerance, atol=tolerance)
    assert np.allclose(a.cost.sum(1), b.cost.sum(1), atol=1e-3 if kind == "sepsis" else 0.05 * horizon)
    given, binned = ((x.action[..., : len(condition.treatments)] * x.dt[..., None]).sum(1) for x in (a, b))
    assert np.allclose(given, binned, atol=1e-3)
    assert b.behaviour_prob is None and b.terminated[:, -1].all()


@pytest.mark.parametrize("timing", ["fixed", "adaptive", "priced"])
@pytest.mark.parametrize("observation", ["full", "partial"])
def test_grid_observations_are_charted(timing, observation):
    rows = env(timing=timing, observation=observation)
    e, again = (rollout_on_grid(rows, uniform_policy(rows), 2.0, seed=1) for _ in range(2))
    assert e.data_hash() == again.data_hash() and e.alignment["step_h"] == 2.0
    assert e.obs.shape == (6, 3, 20) and e.alignment["observation"] == "charted"
    assert np.allclose(e.physical("hours_left"), [[6.0, 4.0, 2.0]] * 6, atol=1e-5)
    assert (e.cost >= 0).all() and (e.cost <= 2 + 1e-5).all() and (0 <= e.action).all() and (e.action <= 1).all()
    chart = rollout(env(observation="partial"), uniform_policy(env()), seed=1)
    assert np.allclose(chart.obs[:, 0, :18], e.obs[:, 0, :18])  # the same chart at the start


def test_grid_under_partial_observation_is_the_same_treatment():
    "What the grid records besides does not change what the policy sees."
    rows = env(observation="partial", timing="adaptive", backend="ode")
    policy = Steady(18, 4)
    a, b = rollout(rows, policy, seed=6), rollout_on_grid(rows, policy, 1.5, seed=6)
    given, binned = ((x.action[..., :3] * x.dt[..., None]).sum(1) for x in (a, b))
    assert np.allclose(given, binned, atol=1e-3)


def test_bad_requests_are_named():
    rows = env()
    with pytest.raises(ValueError, match="episodes=0"): rollout(rows, uniform_policy(rows), 0)
    for step in (4.0, 100.0):
        with pytest.raises(ValueError, match="step_h.*6 h"): rollout_on_grid(rows, uniform_policy(rows), step)
