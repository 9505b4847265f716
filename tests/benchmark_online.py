"""PPO, TRPO and SAC beside Stable-Baselines3 and sb3-contrib, at MedGym's settings. Not part of the test run.

    python tests/benchmark_online.py [--updates 1] [--algorithms ppo trpo sac kernels] [--policies 1 4 16]

Virtual septic patients (surrogate, five adaptive decisions), observations of 8 numbers, 2 x 256 units, rollouts of
2,048, PPO's 10 passes in minibatches of 64; K policies with 8 rows each. One thread, CPU seconds; a rate is
decisions of all policies per CPU second, practice and learning together, after one update to warm up. Peers train
one policy: on 1 and 16 of our single environments, and (fairest) on 16 rows of our vector environment. SAC: gradient
steps of a policy a second, batch 512. Kernels: what PPO's matrix products, tanh and Adam alone would allow.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from medsim.agents import ppo, sac, trpo
from medsim.agents.onpolicy import Student, practise
from medsim.agents.ward import PatientWard, seeds_of
from medsim.envs.registration import make_env, sepsis
from medsim.envs.vector import TreatmentVectorEnv, to_sb3

warnings.simplefilter("ignore")
SETTING: dict[str, Any] = dict(timing="adaptive", budget=5, backend="pinn")
ROLLOUT = 2048
ALL = ["ppo", "trpo", "sac", "kernels"]


def timed(learn: Callable[[], Any], decisions: int) -> float:
    begin = time.process_time()
    learn()
    return decisions / (time.process_time() - begin)


def ours(name: str, k: int, updates: int) -> float:
    "Decisions a second of K policies."
    ward = PatientWard(TreatmentVectorEnv(sepsis().select(range(k)), 8, **SETTING))
    room, config = (ppo, ppo.PPO()) if name == "ppo" else (trpo, trpo.TRPO())
    student = Student(ward, config, seeds_of(0, k))

    def update() -> None:
        practice = practise(student)
        room.improve(student, practice, practice.advantage, config)  # type: ignore[attr-defined]
        student.update += 1

    update()
    return timed(lambda: [update() for _ in range(updates)], k * ROLLOUT * updates)


def theirs(name: str, rows: int, together: bool, updates: int) -> float | None:
    "Decisions a second of one policy; None where the library is not installed."
    try:
        from stable_baselines3.common.vec_env import DummyVecEnv

        library = __import__("stable_baselines3" if name == "ppo" else "sb3_contrib")
    except ImportError: return None
    if together: env: Any = to_sb3(TreatmentVectorEnv(sepsis().select([0]), rows, **SETTING))
    else: env = DummyVecEnv([lambda: make_env("medsim/Sepsis-v0", patient=0, **SETTING)] * rows)
    more: dict[str, Any] = dict(cg_max_steps=10, n_critic_updates=5)
    if name == "ppo": more = dict(n_epochs=10, ent_coef=0.01)
    net = dict(pi=[256, 256], vf=[256, 256])
    more |= dict(n_steps=ROLLOUT // rows, batch_size=64, gamma=0.997, device="cpu", seed=0)
    peer = getattr(library, name.upper())("MlpPolicy", env, policy_kwargs=dict(net_arch=net), **more)
    peer.learn(ROLLOUT)
    return timed(lambda: peer.learn(ROLLOUT * updates), ROLLOUT * updates)


def our_sac(k: int, steps: int) -> float:
    "Gradient steps a second of K policies together."
    ward = PatientWard(TreatmentVectorEnv(sepsis().select(range(k)), 16, **SETTING))
    student = sac.SoftStudent(ward, sac.SAC(rollout=960, warmup=960, buffer=9_600), seeds_of(0, k))
    student.practise()
    student.update += 1
    sac.improve(student, 960)
    return timed(lambda: [sac.improve(student, 960) for _ in range(steps)], k * steps)


def their_sac(steps: int) -> float | None:
    "Gradient steps a second of one policy."
    try:
        from stable_baselines3 import SAC
    except ImportError: return None
    env = to_sb3(TreatmentVectorEnv(sepsis().select([0]), 16, **SETTING))
    nets = dict(net_arch=[256, 256])
    peer = SAC("MlpPolicy", env, batch_size=512, learning_starts=960, device="cpu", seed=0, policy_kwargs=nets)
    peer.learn(976)
    peer.train(3, 512)
    return timed(lambda: peer.train(steps, 512), steps)


def kernels(k: int, repeats: int = 50) -> float:
    "Decisions a CPU second that the kernels of PPO's update allow: products, tanh, Adam of two networks; nothing else."
    sizes, m, work = ((8, 256), (256, 256), (256, 4)), 64, 0.0

    def cost(f: Callable[[], Any]) -> float:
        for _ in range(5): f()
        return 1 / timed(lambda: [f() for _ in range(repeats)], repeats)

    for a, b in sizes:
        x, w, bias, g = (torch.randn(*s) for s in ((k, m, a), (k, a, b), (k, 1, b), (k, m, b)))
        weight = torch.nn.Parameter(w.clone())
        weight.grad = torch.randn_like(w)
        adam = torch.optim.Adam([weight], fused=True)
        products = [lambda x=x, w=w, bias=bias: torch.baddbmm(bias, x, w), lambda x=x, g=g: x.mT @ g]
        if a > 8: products.append(lambda g=g, w=w: g @ w.mT)
        if b == 256: products += [lambda g=g: torch.tanh(g), lambda g=g, x=x: torch.ops.aten.tanh_backward(g, g)]
        work += 2 * sum(map(cost, [*products, adam.step]))
    return k * m / (10 * work)


def report_ppo_like(name: str, policies: list[int], updates: int) -> None:
    library = "Stable-Baselines3" if name == "ppo" else "sb3-contrib"
    peers: dict[str, float] = {}
    for label, rows, together in (("1", 1, False), ("16", 16, False), ("16 batched", 16, True)):
        rate = theirs(name, rows, together, updates)
        if rate is None:
            print(f"{name.upper()}: {library} is not installed, skipped")
            break
        peers[label] = rate
        print(f"{name.upper():5} {library}, rows {label:11} {rate:8,.0f} /s", flush=True)
    for k in policies:
        rate = ours(name, k, updates)
        ratios = ", ".join(f"{rate / peer:.1f}x {label}" for label, peer in peers.items())
        print(f"{name.upper():5} ours, K = {k:<17} {rate:8,.0f} /s  {ratios}", flush=True)


def report_sac(policies: list[int]) -> None:
    peer = their_sac(40)
    print(f"SAC   Stable-Baselines3 {peer or float('nan'):.1f} gradient steps/s", flush=True)
    for k in policies:
        rate = our_sac(k, max(40 // k, 4))
        ratio = rate / peer if peer else float("nan")
        print(f"SAC   ours, K = {k:<5} {rate:.1f} gradient steps/s  {ratio:.2f}x", flush=True)


def report_kernels(policies: list[int], updates: int) -> None:
    for k in policies:
        most, rate = kernels(k), ours("ppo", k, updates)
        print(f"PPO   K = {k:<5} kernels alone {most:,.0f} /s; ours, with its practice, {rate:,.0f} /s: "
              f"{100 * rate / most:.0f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--algorithms", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--policies", nargs="+", type=int, default=[1, 4, 16])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.algorithms:
        if name == "kernels": report_kernels(asked.policies, asked.updates)
        elif name == "sac": report_sac(asked.policies)
        else: report_ppo_like(name, asked.policies, asked.updates)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__": main()
