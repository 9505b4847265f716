"""ICU-Sepsis side by side with the published environment: steps, memory, construction. Not part of the test run.

    python tests/benchmark_tabular.py [--seconds 3] [--no-learning]

One thread, CPU seconds, in one process: the published environment alone and 64 of them in Gymnasium's `SyncVectorEnv`;
ours alone, and 1 to 4,096 side by side. Actions are random and drawn before the clock starts; episodes that end begin
anew within the time measured. A rate is the best of three; a ratio is that to the published single environment. Memory
is what the process grows by when 64 environments are made and run (each kind in a process of its own). At last 500,000
episodes of Q-learning for 8 seeds, by the wall clock on all cores.
"""

import argparse
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

warnings.simplefilter("ignore")
PUBLISHED = "Sepsis/ICU-Sepsis-v2"


def rate(step: Callable[[int], Any], rows: int, seconds: float) -> float:
    "Rows stepped per CPU second, best of three."
    best, j = 0.0, 0
    for _ in range(3):
        begin, steps = time.process_time(), 0
        while (spent := time.process_time() - begin) < seconds / 3:
            step(j)
            j, steps = j + 1, steps + 1
        best = max(best, rows * steps / spent)
    return best


def alone(env: Any) -> Callable[[int], None]:
    actions = np.random.default_rng(0).integers(25, size=10_000).tolist()
    env.reset(seed=0)

    def step(j: int) -> None:
        if env.step(actions[j % 10_000])[2]: env.reset()

    return step


def together(env: Any) -> Callable[[int], Any]:
    actions = np.random.default_rng(0).integers(25, size=(64, env.num_envs))
    env.reset(seed=0)
    return lambda j: env.step(actions[j % 64])


def published() -> Any:
    import gymnasium
    import icu_sepsis  # noqa: F401  (registers it)

    return gymnasium.make(PUBLISHED, disable_env_checker=True)


def resident_mb() -> float:
    "Memory of this process (Linux)."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def memory(kind: str, pipe: Any) -> None:
    "Megabytes by which 64 environments let this process grow, and seconds to make them."
    import gymnasium

    if kind == "published":
        import icu_sepsis  # noqa: F401
    else:
        from medsim.envs.icu_sepsis import ICUSepsisEnv, ICUSepsisVectorEnv
    before, begin = resident_mb(), time.perf_counter()
    if kind == "published":
        env: Any = gymnasium.vector.SyncVectorEnv([published] * 64)
    elif kind == "ours, one by one":
        env = gymnasium.vector.SyncVectorEnv([ICUSepsisEnv] * 64)
    else:
        env = ICUSepsisVectorEnv(64)
    seconds = time.perf_counter() - begin
    step = together(env)
    for j in range(64): step(j)
    pipe.send((resident_mb() - before, seconds))


def apart(kind: str) -> tuple[float, float]:
    "`memory` in a fresh process."
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=memory, args=(kind, theirs))
    process.start()
    result = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--no-learning", action="store_true")
    a = parser.parse_args()
    import gymnasium

    from medsim.envs.icu_sepsis import ICUSepsisEnv, ICUSepsisVectorEnv, load_official

    begin = time.perf_counter()
    load_official()
    read = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(20): ICUSepsisEnv()
    made = (time.perf_counter() - begin) / 20
    begin = time.perf_counter()
    ICUSepsisVectorEnv(4096)
    batch = time.perf_counter() - begin
    begin = time.perf_counter()
    env = published()
    theirs = time.perf_counter() - begin
    print(f"construction: published {theirs:.2f} s; our tables, read once, {read:.2f} s, "
          f"then an environment {1e3 * made:.1f} ms, 4,096 side by side {1e3 * batch:.0f} ms")

    base = rate(alone(env), 1, a.seconds)
    print(f"{'published, alone':32}{base:14,.0f} steps/s   1.0x")
    sync = gymnasium.vector.SyncVectorEnv([published] * 16)
    rows = [("published, SyncVectorEnv(16)", rate(together(sync), 16, a.seconds)),
            ("ours, alone", rate(alone(ICUSepsisEnv()), 1, a.seconds))]
    rows += [(f"ours, {n} side by side", rate(together(ICUSepsisVectorEnv(n)), n, a.seconds))
             for n in (1, 16, 64, 256, 1024, 4096)]
    for name, r in rows: print(f"{name:32}{r:14,.0f} steps/s {r / base:5.1f}x")

    for kind in ("published", "ours, one by one", "ours, side by side"):
        grown, seconds = apart(kind)
        print(f"64 environments, {kind}: {grown:,.0f} MB more, made in {seconds:.2f} s (tables read included)")

    if not a.no_learning:
        from medsim.agents.tabular import QLearning, train

        train(load_official(), QLearning(), episodes=100, seed=0, progress=False)  # compile
        begin = time.perf_counter()
        result = train(load_official(), QLearning(), episodes=500_000, seed=range(8), checkpoints=10, progress=False)
        last = result.history.groupby("seed").value.last()
        print(f"Q-learning, 500,000 episodes, 8 seeds: {time.perf_counter() - begin:.0f} s; exact value of the greedy "
              f"policies {last.mean():.4f} +- {last.std():.4f}")


if __name__ == "__main__":
    main()
