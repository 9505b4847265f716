"""Offline agents: gradient steps of a policy a CPU second, K policies stacked. Not part of the test run.

    python tests/benchmark_offline.py [--steps 60] [--policies 1 4 16] [--batches 64 256] [--agents bc dqn cql iql]

Observations of 48 numbers, 25 actions, 2 x 256 units; batches of 64 and 256; one thread, CPU seconds. A rate is the
gradient steps of all policies a CPU second, batches drawn and slow copies moved, after a few to warm up. Run with an
interpreter that has d3rlpy 2.8 but not medsim, it times d3rlpy's DiscreteCQL and DQN at the same sizes instead;
`--peer PYTHON` runs both, in turn, and prints ratios.
"""

import argparse
import json
import os
import subprocess
import time
from typing import Any

import numpy as np
import torch

ROWS, FEATURES, ACTIONS = 20_000, 48, 25


def timed(step: Any, n: int) -> float:
    "Calls a CPU second; `step` takes the number of the call."
    for j in range(3): step(j)
    begin = time.process_time()
    for j in range(n): step(3 + j)
    return n / (time.process_time() - begin)


def ours(name: str, k: int, size: int, steps: int) -> float:
    "Gradient steps of a policy a second, K stacked."
    import importlib

    from medsim.agents.offline import improve
    from medsim.agents.policy import Actions
    from medsim.agents.replay import Replay

    room = importlib.import_module(f"medsim.agents.{name}")
    kind = {"bc": "Cloning", "dqn": "DoubleQ", "cql": "Conservative", "iql": "Implicit"}[name]
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(ROWS, FEATURES, generator=g)
    replay = Replay(obs, torch.randint(ACTIONS, (ROWS,), generator=g), torch.rand(ROWS, generator=g), obs.roll(-1, 0),
                    0.99 * (torch.rand(ROWS, generator=g) > 0.1), torch.zeros(ROWS, dtype=torch.int64),
                    torch.zeros(k, dtype=torch.int64), torch.full((k,), ROWS), Actions(True, ACTIONS))
    learner = getattr(room, kind)(replay, None, getattr(room, name.upper())(batch=size), list(range(k)))
    n = max(steps // k, 4)
    places = replay.places(learner.key, torch.arange(n + 3), size)  # what a run does for 50 steps at a time
    begin = time.process_time()
    replay.places(learner.key, torch.arange(n), size)
    drawing = (time.process_time() - begin) / n
    return k / (1 / timed(lambda j: improve(learner, j, replay.rows(places[j])), n) + drawing)


def theirs(name: str, size: int, steps: int) -> float:
    "d3rlpy's gradient steps a second, one policy."
    import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    rng = np.random.default_rng(0)
    ends = (rng.random(ROWS) < 0.1).astype(np.float32)
    ends[-1] = 1
    data = d3rlpy.dataset.MDPDataset(rng.normal(size=(ROWS, FEATURES)).astype(np.float32),
                                     rng.integers(ACTIONS, size=(ROWS, 1)), rng.random(ROWS).astype(np.float32), ends)
    config = {"cql": d3rlpy.algos.DiscreteCQLConfig, "dqn": d3rlpy.algos.DQNConfig}[name](batch_size=size)
    agent = config.create(device="cpu:0")
    agent.build_with_dataset(data)
    return timed(lambda j: agent.update(data.sample_transition_batch(size)), steps)


def peers(batches: list[int], steps: int) -> dict[str, float]:
    return {f"{name} {size}": theirs(name, size, steps) for name in ("cql", "dqn") for size in batches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--policies", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--agents", nargs="+", default=["bc", "dqn", "cql", "iql"])
    parser.add_argument("--peer", help="an interpreter with d3rlpy")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    try:
        import medsim  # noqa: F401
    except ImportError:
        print(json.dumps(peers(asked.batches, asked.steps)))
        return
    other: dict[str, float] = {}
    if asked.peer:
        call = [asked.peer, __file__, "--steps", str(asked.steps), "--batches", *map(str, asked.batches)]
        clean = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
        said = subprocess.run(call, capture_output=True, text=True, check=True, env=clean).stdout
        other = json.loads(said.splitlines()[-1])
        for name, rate in other.items(): print(f"d3rlpy {name:8} {rate:8,.0f} /s", flush=True)
    for name in asked.agents:
        for size in asked.batches:
            single = None
            for k in asked.policies:
                rate = ours(name, k, size, asked.steps)
                single = single or rate
                beside = f", {rate / other[f'{name} {size}']:.1f}x d3rlpy" if f"{name} {size}" in other else ""
                stacked = f"{rate / single:.1f}x K = {asked.policies[0]}"
                print(f"{name:4} batch {size:4} K = {k:<3} {rate:8,.0f} /s  {stacked}{beside}", flush=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__": main()
