"""Offline agents: gradient steps of a policy a CPU second, K policies stacked. Not part of the test run.

    python tests/benchmark_offline.py [--steps 60] [--rounds 5] [--policies 1 4 16] [--batches 64 256] [--agents ...]

Observations of 48 numbers, 25 actions, 2 x 256 units; batches of 64 and 256; one thread, CPU seconds. A rate is the
gradient steps of all policies a CPU second, batches drawn and slow copies moved, after a few to warm up; the median of
`--rounds`. `--peer PYTHON`, an interpreter that has d3rlpy 2.8 but not medsim, times d3rlpy's DiscreteCQL and DoubleDQN
at the same sizes in turns with ours, so that a busy machine slows both, and prints the median of the rounds' ratios. In
such a run ours does what theirs does: the slow network is copied every 8,000 steps and no gradient is clipped
(`--own`: our defaults, which follow slowly at each step and clip). Ours works the slow values of all rows out once
after each copy; that falls into the warm-up. Of 8,000 steps it would be 313 passes of 64 rows beside 40,000, .8 %:
reckoned, not measured.
"""

import argparse
import json
import os
import sys
import time
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import torch
from other_interpreter import Peer

ROWS, FEATURES, ACTIONS = 20_000, 48, 25


def timed(step: Any, n: int) -> float:
    "Calls a CPU second; `step` takes the number of the call."
    for j in range(3): step(j)
    begin = time.process_time()
    for j in range(n): step(3 + j)
    return n / (time.process_time() - begin)


@cache
def ours(name: str, k: int, size: int, own: bool) -> Any:
    "A gradient step of K policies stacked, to be called with its number."
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
    alike = {} if own or name not in ("dqn", "cql") else dict(tau=1.0, target_every=8_000, max_grad_norm=float("inf"))
    learner = getattr(room, kind)(replay, None, getattr(room, name.upper())(batch=size, **alike), list(range(k)))
    places: list[torch.Tensor] = []

    def step(j: int) -> None:
        if not j % 50: places[:] = replay.places(learner.key, torch.arange(j, j + 50), size)  # as a run does
        improve(learner, j, {**replay.rows(places[j % 50]), "place": places[j % 50]})

    return step


@cache
def theirs(name: str, size: int) -> Any:
    "A gradient step of d3rlpy's, one policy."
    import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    rng = np.random.default_rng(0)
    ends = (rng.random(ROWS) < 0.1).astype(np.float32)
    ends[-1] = 1
    data = d3rlpy.dataset.MDPDataset(rng.normal(size=(ROWS, FEATURES)).astype(np.float32),
                                     rng.integers(ACTIONS, size=(ROWS, 1)), rng.random(ROWS).astype(np.float32), ends)
    config = {"cql": d3rlpy.algos.DiscreteCQLConfig, "dqn": d3rlpy.algos.DoubleDQNConfig}[name](batch_size=size)
    agent = config.create(device="cpu:0")
    agent.build_with_dataset(data)
    return lambda j: agent.update(data.sample_transition_batch(size))


def serve() -> None:
    "The peer's rate for each line \"name size steps\" that comes."
    for line in sys.stdin:
        name, size, steps = line.split()
        print(json.dumps(timed(theirs(name, int(size)), int(steps))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of a policy, in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--agents", nargs="+", default=["bc", "dqn", "cql", "iql"])
    parser.add_argument("--peer", help="an interpreter with d3rlpy")
    parser.add_argument("--own", action="store_true", help="our defaults beside the peer's")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    try:
        import medsim  # noqa: F401
    except ImportError:
        serve()
        return
    peer = Peer(asked.peer, __file__, "d3rlpy") if asked.peer else None
    for name in asked.agents:
        for size in asked.batches:
            single = None
            for k in asked.policies:
                step, n = ours(name, k, size, asked.own or not peer), max(asked.steps // k, 4)
                rates, ratios = [], []
                for _ in range(asked.rounds):
                    other = peer.rate(name, size, asked.steps) if peer and name in ("cql", "dqn") else None
                    rates.append(k * timed(step, n))
                    if other: ratios.append(rates[-1] / other)
                single = single or median(rates)
                beside = f", {median(ratios):.1f}x d3rlpy ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else ""
                print(f"{name:4} batch {size:4} K = {k:<3} {median(rates):8,.0f} /s  "
                      f"{median(rates) / single:.1f}x K = {asked.policies[0]}{beside}", flush=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__": main()
