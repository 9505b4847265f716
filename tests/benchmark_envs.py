"""How many decisions a second, one patient at a time and many side by side? Not part of the test run.

    python tests/benchmark_envs.py [--rows 1 16 256 1024] [--seconds 2] [--timing fixed] [--observation full] [--no-ode]

One torch thread, CPU seconds, everything side by side in one process, on virtual septic patients: the single
environment with the surrogate and with the solver; Stable-Baselines3's `DummyVecEnv` of it, made by hand and by
`make_vec_env`, where Stable-Baselines3 is there; and `TreatmentVectorEnv` with more and more rows, copies of one
patient as well as different ones, by numpy and by torch. Actions are random and drawn before the clock starts; episodes
that end begin anew within the time measured. A rate is the best of three runs; a ratio is that to the single
environment with the same solver.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from medsim.envs.registration import sepsis
from medsim.envs.treatment import TreatmentEnv
from medsim.envs.vector import TreatmentVectorEnv, to_sb3
from medsim.sim.simulator import Simulator


def rate(step: Callable[[int], None], rows: int, seconds: float, runs: int = 3) -> float:
    "Rows stepped per CPU second: the best of `runs`, each of about `seconds` / `runs`."
    step(0)
    best, j = 0.0, 1
    for _ in range(runs):
        begin, steps = time.process_time(), 0
        while (spent := time.process_time() - begin) < seconds / runs or steps < 2:
            step(j)
            j, steps = j + 1, steps + 1
        best = max(best, rows * steps / spent)
    return best


def drawn(space: Any, n: int = 32) -> list[Any]:
    space.seed(0)
    return [space.sample() for _ in range(n)]


def single(env: TreatmentEnv) -> Callable[[int], None]:
    actions = drawn(env.action_space)
    env.reset(seed=0)

    def step(j: int) -> None:
        if env.step(actions[j % 32])[2]: env.reset()

    return step


def side_by_side(env: TreatmentVectorEnv, by_torch: bool) -> Callable[[int], None]:
    actions = drawn(env.action_space)
    env.reset(seed=0)
    if not by_torch: return lambda j: (env.step(actions[j % 32]), None)[1]
    tensors = [torch.from_numpy(a) for a in actions]
    return lambda j: (env.step_torch(tensors[j % 32]), None)[1]


def of_sb3(rows: Any) -> Callable[[int], None]:
    "Steps of a `VecEnv`."
    actions = [np.stack(drawn(rows.action_space, rows.num_envs)) for _ in range(4)]
    rows.reset()
    return lambda j: (rows.step(actions[j % 4]), None)[1]


def report(name: str, rows: int, found: float, base: float | None) -> float:
    ratio = "" if base is None else f"{found / base:9.1f} x"
    print(f"{name:50s}{rows:6d}{found:14,.0f} steps/s{ratio}", flush=True)
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024])
    ap.add_argument("--seconds", type=float, default=2.0, help="CPU seconds a line")
    ap.add_argument("--timing", default="fixed")
    ap.add_argument("--observation", default="full")
    ap.add_argument("--no-ode", action="store_true")
    a = ap.parse_args()
    torch.set_num_threads(1)
    how: dict[str, Any] = dict(timing=a.timing, observation=a.observation)
    condition = sepsis()
    print(f"medsim/Sepsis-v0, {a.timing} timing, {a.observation} observation, 10 decisions in 96 h")
    for backend in ("pinn", *(() if a.no_ode else ("ode",))):
        fixed: dict[str, Any] = dict(how, backend=backend)
        one = report(f"single, {backend}", 1, rate(single(TreatmentEnv(condition, **fixed)), 1, a.seconds), None)
        baselines(condition, fixed, one, a.seconds)
        for n in a.rows:
            for name, rows in rows_of_all_kinds(condition, n, fixed, backend):
                for by_torch in (False, True):
                    if by_torch and (n == 1 or backend == "ode"): continue
                    way = "torch" if by_torch else "numpy"
                    found = rate(side_by_side(rows, by_torch), n, a.seconds)
                    report(f"vector, {backend}, {name}, {way}", n, found, one)
        if backend == "pinn" and (sb3 := sb3_rows(TreatmentVectorEnv(condition.select([0]), a.rows[-1], **fixed))):
            report(f"to_sb3(vector), {backend}", a.rows[-1], rate(of_sb3(sb3), a.rows[-1], a.seconds), one)


def rows_of_all_kinds(condition: Any, n: int, fixed: dict[str, Any], backend: str) -> Any:
    yield "copies of 1 patient", TreatmentVectorEnv(condition.select([0]), n, **fixed)
    if n > 1 and backend == "pinn":
        sim = Simulator.virtual(n)
        sim.surrogate = condition.model.surrogate.of(sim.ode)
        yield "patients", TreatmentVectorEnv(sim, 1, **fixed)


def sb3_rows(env: TreatmentVectorEnv) -> Any:
    try:
        return to_sb3(env)
    except ImportError:
        return None


def baselines(condition: Any, fixed: dict[str, Any], one: float, seconds: float) -> None:
    "`DummyVecEnv` of the single environment, if Stable-Baselines3 is there."
    try:
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import DummyVecEnv
    except ImportError:
        print("no Stable-Baselines3 here")
        return
    n = 8 if fixed["backend"] == "pinn" else 2
    plain = DummyVecEnv([lambda: TreatmentEnv(condition, **fixed)] * n)
    report(f"DummyVecEnv, {fixed['backend']}", n, rate(of_sb3(plain), n, seconds), one)
    made = make_vec_env("medsim/Sepsis-v0", n_envs=n, env_kwargs=fixed)
    report(f"make_vec_env (DummyVecEnv), {fixed['backend']}", n, rate(of_sb3(made), n, seconds), one)


if __name__ == "__main__":
    main()
