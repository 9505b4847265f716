"Online learners: they solve what has a known answer, alone as side by side; go on after a kill; name bad input."

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsim.agents import lagrangian, ppo, trpo
from medsim.agents.lagrangian import PPOLag, TRPOLag
from medsim.agents.onpolicy import Critic, Diverged, OnPolicy, Result, Student, advantages, explore, judged, practise
from medsim.agents.policy import Actions
from medsim.agents.ppo import PPO
from medsim.agents.trpo import TRPO
from medsim.agents.ward import Experience, GymWard, IdentityWard, PatientWard, Ward, seeds_of
from medsim.envs.registration import sepsis
from medsim.envs.vector import TreatmentVectorEnv

torch.set_num_threads(1)
COPY = dict(rollout=320, hidden=(32,), critic_rate=3e-3, minibatch=160)
FAST = {
    "ppo": PPO(6_400, epochs=8, actor_rate=5e-3, **COPY),
    "trpo": TRPO(9_600, radius=0.03, **COPY),
    "ppo_lag": PPOLag(6_400, epochs=8, actor_rate=5e-3, cost_limit=24.0, **COPY),
    "trpo_lag": TRPOLag(9_600, radius=0.03, cost_limit=24.0, **COPY),
}
TINY = dict(rollout=32, hidden=(8,), minibatch=16)
SHORT = {
    "ppo": PPO(32 * 15, epochs=2, **TINY),
    "trpo": TRPO(32 * 15, **TINY),
    "ppo_lag": PPOLag(32 * 15, epochs=2, cost_limit=1.0, **TINY),
    "trpo_lag": TRPOLag(32 * 15, cost_limit=1.0, **TINY),
}
AGENTS = list(SHORT)


def train(env: Ward | TreatmentVectorEnv, config: Any, **keywords: Any) -> Result:
    room = lagrangian if isinstance(config, lagrangian.Limited) else ppo if isinstance(config, PPO) else trpo
    return room.train(env, config, progress=False, **keywords)


ALL = lru_cache(sepsis)


def patients(ids: list[int], budget: int = 5, copies: int = 8, **keywords: Any) -> TreatmentVectorEnv:
    return TreatmentVectorEnv(ALL().select(ids), copies, timing="adaptive", budget=budget, backend="pinn", **keywords)


def same(a: Result, b: Result) -> None:
    "Bit for bit."
    for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True): assert torch.equal(x, y)
    pd.testing.assert_frame_equal(a.history, b.history, check_exact=True)


# ---- they learn


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("n", [0, 4], ids=["number", "symbol"])
def test_copies_what_it_sees(name: str, n: int):
    h = train(IdentityWard(2, 32, n), FAST[name], seed=0).history
    last = h[h["step"] > 0.9 * h["step"].max()].groupby("policy")["return"].mean()
    assert (last > (9.0 if n else -0.25)).all(), last


@pytest.mark.parametrize("name", ["ppo_lag", "trpo_lag"])
def test_ends_within_a_tenth_of_the_limit(name: str):
    config = replace(FAST[name], steps=19_200, cost_limit=4.0)  # unlimited, copying costs 12 hours a day
    h = train(IdentityWard(2, 64), config, seed=0).history
    last = h[h["step"] > 0.6 * h["step"].max()].groupby("policy")["cost_per_day"].mean()
    assert (abs(last / 4 - 1) < 0.1).all(), last


def test_no_step_leaves_the_trust_region():
    h = train(IdentityWard(3, 16), replace(FAST["trpo"], steps=1_600), seed=1).history
    assert (h["kl"] <= 0.03).all() and (h["size"] > 0).any() and (h["gain"] >= 0).all()


def test_policies_whose_step_fails_keep_their_weights():
    start = torch.randn(3, 5)
    w = start.clone()
    ups = torch.tensor([1.0, -1.0, torch.nan])

    def judge() -> tuple[torch.Tensor, torch.Tensor]: return ups * (w - start).sum(1), torch.zeros(3)

    size, gain, _ = trpo.line_search([w], torch.ones(3, 5), judge, TRPO())
    assert size.tolist() == [1, 0, 0] and gain.tolist()[1:] == [0, 0]
    assert torch.equal(w[0], start[0] + 1) and torch.equal(w[1:], start[1:])


# ---- side by side as alone; the same again


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("where", ["identity", "patients"])
def test_side_by_side_is_as_alone(name: str, where: str):
    def ward(k: list[int]) -> Any:
        return IdentityWard(len(k), 4) if where == "identity" else patients([7 + i for i in k])

    config = replace(SHORT[name], steps=160)
    three = train(ward([0, 1, 2]), config, seed=[5, 6, 7])
    for k in range(3):
        one = train(ward([k]), config, seed=[5 + k])
        for x, y in zip(one.policy.member(0).parameters(), three.policy.member(k).parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
        own = three.history[three.history["policy"] == three.history["policy"].unique()[k]].drop(columns="policy")
        columns = [c for c in own if c not in ("clipped",)]  # a share of decisions just inside or outside
        np.testing.assert_allclose(one.history[columns].to_numpy(float), own[columns].to_numpy(float), 2e-3, 2e-3)


@pytest.mark.parametrize("name", AGENTS)
def test_same_seed_same_numbers(name: str):
    config = replace(SHORT[name], steps=96)
    first, again, other = (train(patients([0, 1]), config, seed=s) for s in (3, 3, 4))
    same(first, again)
    assert not torch.equal(first.policy.net.weight[0], other.policy.net.weight[0])


# ---- stopped and gone on with


class Stop(Exception): pass


def stop_at(step: int) -> Any:
    def log(row: dict[str, Any], at: int) -> None:
        if at >= step: raise Stop

    return log


@pytest.mark.parametrize("name", AGENTS)
def test_resumes_bit_for_bit(name: str, tmp_path: Path):
    whole = train(patients([0, 1]), SHORT[name], seed=0)
    with pytest.raises(Stop):
        train(patients([0, 1]), SHORT[name], seed=0, checkpoint=tmp_path / "run", log=stop_at(390))
    resumed = train(patients([0, 1]), SHORT[name], seed=0, checkpoint=tmp_path / "run", log=tmp_path / "log.jsonl")
    same(whole, resumed)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps[0] == 352 and steps[-1] == 480, "gone on with after the tenth update, not begun anew"
    same(whole, train(patients([0, 1]), SHORT[name], seed=0, checkpoint=tmp_path / "run"))  # nothing is left to do


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_online_agents import SHORT, IdentityWard, train, replace
train(IdentityWard(1, 8), replace(SHORT["ppo"], steps=32))  # imports what torch puts off, once for all
def log(row, at):
    if at >= 400: os.kill(os.getpid(), signal.SIGKILL)
for name, config in SHORT.items():
    if not os.fork(): train(IdentityWard(2, 8), config, seed=0, checkpoint=f"{sys.argv[2]}/{name}", log=log)
    print(name, os.WTERMSIG(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_resumes_after_a_kill(tmp_path: Path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    said = subprocess.run(command, timeout=120, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [f"{name} {int(signal.SIGKILL)}" for name in AGENTS]
    for name in AGENTS:
        assert (tmp_path / name / "run.json").is_file()
        resumed = train(IdentityWard(2, 8), SHORT[name], seed=0, checkpoint=tmp_path / name)
        same(resumed, train(IdentityWard(2, 8), SHORT[name], seed=0))


@pytest.mark.parametrize("left", [(), ("run.json",), ("run.json", "run.safetensors")], ids=["empty", "torn", "both"])
def test_resumes_after_a_kill_between_two_checkpoints(left: tuple[str, ...], tmp_path: Path):
    "The new checkpoint stands whole beside what is left of the old one."
    config, run = SHORT["ppo"], tmp_path / "run"
    whole = train(IdentityWard(2, 4), config, seed=0, checkpoint=run)
    run.rename(tmp_path / "run.new")
    run.mkdir()
    for name in left: (run / name).write_text("{}")
    same(whole, train(IdentityWard(2, 4), config, seed=0, checkpoint=run))


def test_refuses_the_checkpoint_of_another_run(tmp_path: Path):
    config, run = SHORT["ppo_lag"], tmp_path / "run"
    train(patients([0, 1]), config, seed=0, checkpoint=run)
    others = [(patients([0, 1]), config, 1), (patients([0, 2]), config, 0), (patients([0, 1], budget=6), config, 0),
              (patients([0, 1]), replace(config, cost_limit=2.0), 0), (patients([0, 1]), SHORT["ppo"], 0),
              (IdentityWard(2, 8), config, 0)]
    for env, other, seed in others:
        with pytest.raises(ValueError, match="run: the checkpoint of another run"):
            train(env, other, seed=seed, checkpoint=run)


def test_a_foreign_environment_cannot_be_kept(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be kept"):
        train(GymWard("Pendulum-v1"), replace(SHORT["ppo"], steps=32), checkpoint=tmp_path / "run")
    assert not list(tmp_path.iterdir())


# ---- numbers that are none


class BrokenWard(IdentityWard):
    "Pays policy 1 no number from step 8 on."

    def step(self, action: torch.Tensor) -> Experience:
        e = super().step(action)
        if self.time.max() > 8: e.reward[1] = torch.nan
        return e


@pytest.mark.parametrize("name", AGENTS)
def test_a_reward_that_is_no_number_is_named(name: str):
    with pytest.raises(Diverged, match=r"policy 1, step 32: critic_loss is not a finite number"):
        train(BrokenWard(3, 4), SHORT[name], seed=0)


def test_divergence_names_the_patient():
    def reward(y: torch.Tensor, u: torch.Tensor) -> torch.Tensor: return y[..., 0] * 0 + 1e30

    with pytest.raises(Diverged, match="policy 7, step 0"):
        train(patients([7, 8], reward=reward), replace(SHORT["ppo"], hidden=(8,)), seed=0)


# ---- settings


@pytest.mark.parametrize("config, bad", [
    (PPO, dict(steps=0)), (PPO, dict(rollout=-1)), (PPO, dict(gae_lambda=1.1)), (PPO, dict(actor_rate=0.0)),
    (PPO, dict(critic_rate=float("nan"))), (PPO, dict(max_grad_norm=0)), (PPO, dict(minibatch=4096)),
    (PPO, dict(epochs=0)), (PPO, dict(clip=0.0)), (PPO, dict(entropy=-1.0)),
    (TRPO, dict(radius=0.0)), (TRPO, dict(solver_steps=0)), (TRPO, dict(damping=0.0)), (TRPO, dict(backtracks=0)),
    (TRPO, dict(shrink=1.0)), (TRPO, dict(value_passes=0)), (TRPO, dict(minibatch=0)),
    (PPOLag, dict(cost_limit=-1.0)), (TRPOLag, dict(cost_limit=float("nan"))), (PPOLag, dict(lagrange_rate=0.0)),
    (TRPOLag, dict(lagrange_damping=-0.1)), (PPOLag, dict(multiplier=float("inf"))), (TRPOLag, dict(shrink=0.0)),
    (PPOLag, dict(clip=0.0)),
])
def test_settings_at_fault_are_named(config: type[OnPolicy], bad: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(bad))): config(**bad)


def test_seeds_and_rows_at_fault_are_named():
    with pytest.raises(ValueError, match="seed: 3 seeds for 2 policies"): seeds_of([1, 2, 3], 2)
    with pytest.raises(ValueError, match="rollout=32: is not a multiple of the 5 rows"):
        train(IdentityWard(1, 5), SHORT["ppo"])
    with pytest.raises(ValueError, match="policies=3: 16 rows"): PatientWard(patients([0, 1]), policies=3)


# ---- the parts


def slow_advantages(reward: Any, discount: Any, value: Any, after: Any, over: Any, lam: float) -> Any:
    "Each decision's sum of surprises, one by one."
    out = np.zeros_like(reward)
    for t in range(len(reward)):
        weight, s = 1.0, t
        while True:
            out[t] += weight * (reward[s] + discount[s] * after[s] - value[s])
            if over[s] or s + 1 == len(reward): break
            weight *= discount[s] * lam
            s += 1
    return out


@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), ends=st.floats(0, 1), lam=st.floats(0, 1))
def test_advantages_are_sums_of_surprises(seed: int, n: int, ends: float, lam: float):
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(2, n))
    discount, over = rng.uniform(0, 1, n), rng.uniform(size=n) < ends
    cut = over & (rng.uniform(size=n) < 0.5)
    after = np.where(over & ~cut, 0.0, rng.normal(size=n))
    given = [torch.as_tensor(x).view(1, n, 1) for x in (reward, discount, value, after, over)]
    got = advantages(*given, lam).flatten().numpy()
    np.testing.assert_allclose(got, slow_advantages(reward, discount, value, after, over, lam), atol=1e-9)


@given(seed=st.integers(0, 2**31), mean=st.floats(-1e3, 1e3), sd=st.floats(1e-2, 1e3))
def test_critic_follows_without_changing_its_values(seed: int, mean: float, sd: float):
    gen = torch.Generator().manual_seed(seed)
    critic = Critic(3, (8,), "tanh", [seed, seed + 1], "cpu").double()
    obs = torch.randn(2, 20, 3, generator=gen, dtype=torch.float64)
    before = critic(obs)
    for _ in range(3): critic.follow(mean + sd * torch.randn(2, 50, generator=gen, dtype=torch.float64))
    torch.testing.assert_close(critic(obs), before, rtol=1e-6, atol=1e-6 * (abs(mean) + sd))


@given(cost=st.floats(0, 24), limit=st.floats(0, 24), rate=st.floats(1e-3, 1), before=st.floats(0, 10))
def test_the_multiplier_moves_towards_the_limit(cost: float, limit: float, rate: float, before: float):
    after = lagrangian.repriced(torch.tensor([before]), torch.tensor([cost]), limit, rate).item()
    assert after >= 0 and (after >= before - 1e-5 if cost >= limit else after <= before + 1e-5)


# ---- policies


@pytest.mark.parametrize("space", [
    spaces.Discrete(3, start=1), spaces.MultiDiscrete([2, 2]), spaces.Box(-np.inf, 1, (2,)), spaces.Box(0, 1, (2, 2)),
    spaces.MultiBinary(2),
], ids=str)
def test_actions_of_other_spaces_are_refused(space: Any):
    with pytest.raises(ValueError, match="action space .*needs"): Actions.of(space)


# ---- wards


@pytest.mark.parametrize("keywords", [{}, {"observation": "partial"}], ids=["plain", "partial"])
def test_a_ward_goes_on_from_a_kept_state(keywords: dict[str, Any]):
    def fresh() -> PatientWard: return PatientWard(patients([3, 4], **keywords))

    ward, gen = fresh(), torch.Generator().manual_seed(0)
    ward.reset([1, 2])
    actions = torch.rand(14, *ward.shape, ward.actions.n, generator=gen)
    for a in actions[:7]: ward.step(a)
    kept = ward.state()
    went = [ward.step(a) for a in actions[7:]]
    other = fresh()
    other.reset([8, 9])
    other.restore(kept)
    for a, e in zip(actions[7:], went, strict=True):
        for x, y in zip(other.step(a), e, strict=True): assert torch.equal(x, y)
    with pytest.raises(ValueError, match="another ward"): PatientWard(patients([3, 4, 5], **keywords)).restore(kept)


def test_what_a_time_limit_cuts_is_not_over():
    ward = GymWard("Pendulum-v1", policies=2, copies=2)
    student = Student(ward, PPO(rollout=500, hidden=(8,), minibatch=50), [1, 2])
    seen, last = explore(student)
    assert seen["cut"][:, 199].all() and torch.equal(seen["cut"], seen["over"]) and int(seen["cut"].sum()) == 4
    a, target = judged(student.critic, seen, last, "reward", 0.0)
    with torch.no_grad(): value, final = student.critic(seen["obs"][:, 199]), student.critic(seen["final"][:, 199])
    torch.testing.assert_close(a[:, 199], seen["reward"][:, 199] + 0.99 * final - value)
    torch.testing.assert_close(target, a + torch.stack([student.critic(o) for o in seen["obs"].unbind(1)], 1).detach())
    assert np.isfinite(train(ward, replace(SHORT["ppo"], steps=32)).history["gain"]).all()


def test_costs_are_hours_in_danger_whoever_looks():
    "Three looks a stay or six: the same hours."
    def per_day(budget: int) -> float:
        env = TreatmentVectorEnv(ALL().select([3]), 16, timing="fixed", budget=budget, backend="pinn")
        ward, cost, dt = PatientWard(env), 0.0, 0.0
        ward.reset([1])
        for _ in range(budget):
            e = ward.step(torch.full((1, 16, 3), 0.3))
            cost, dt = cost + e.cost.sum().item(), dt + e.dt.sum().item()
        return 24 * cost / dt

    assert per_day(3) == pytest.approx(per_day(6), rel=0.02)


# ---- elsewhere


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", AGENTS)
def test_device_is_honoured(name: str):
    config = replace(SHORT[name], steps=64)
    there = train(patients([0, 1], device="cuda"), config, seed=0)
    assert all(p.is_cuda for p in there.policy.parameters())
    here = train(patients([0, 1]), config, seed=0)
    for x, y in zip(here.policy.parameters(), there.policy.parameters(), strict=True):
        torch.testing.assert_close(x, y.cpu(), rtol=1e-2, atol=1e-3)


def test_practice_has_the_shapes_it_says():
    student = Student(IdentityWard(3, 4, 5), PPO(rollout=40, hidden=(8,), minibatch=10), [1, 2, 3], costs=True)
    p = practise(student)
    assert p.obs.shape == (3, 40, 5) and p.taken.shape == p.advantage.shape == p.cost_target.shape == (3, 40)
    assert p.cost_advantage.any() and p.episodes["episodes"].tolist() == [4, 4, 4]
