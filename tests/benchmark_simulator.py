"""How much faster is the surrogate than the solvers, and how far off? Not part of the test run.

    python tests/benchmark_simulator.py [--steps 1000] [--hybrid] [--seed 0]

One torch thread, CPU seconds (the best of a few runs), everything side by side in one process: one 12 h interval for
1 state of 1 patient, 1 state of each of 110 patients, 64 of each, and 7,040 of 1 patient. Errors are root mean squares
against dopri5 at rtol 1e-8 in double precision, over states of the patients inside charted bounds; the surrogate's
depend on how long it was fitted (`--steps`; 0: speed only). With `--hybrid` the physiology carries a network of 64-64.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch

from medsim.sim.hybrid import HybridODE, correction_net
from medsim.sim.odesolve import flow
from medsim.sim.physiology import HIGH, LOW
from medsim.sim.pinn import Surrogate, SurrogateConfig, fit_surrogate, patient_columns
from medsim.sim.simulator import Simulator

HOURS = 12.0


def cpu(call: Callable[[], torch.Tensor], least: float = 0.3, most: int = 200) -> tuple[float, torch.Tensor]:
    "Best CPU time of a call in ms, over at least 3 calls and about `least` seconds; and what it gave."
    out, times = call(), []
    while len(times) < 3 or (sum(times) < least and len(times) < most):
        start = time.process_time()
        out = call()
        times.append(time.process_time() - start)
    return 1e3 * min(times), out


def bodies(args: argparse.Namespace) -> Simulator:
    "110 virtual patients, as they are or with a (random) correction network on top."
    sim = Simulator.virtual(110, args.seed)
    if not args.hybrid: return sim
    net = correction_net(seed=args.seed)
    with torch.no_grad(): net.weight[-1].mul_(30)  # from nearly nothing to a correction that matters
    ode = HybridODE(sim.ode, net, level=sim.mean0, log_pull=-3.0).requires_grad_(False)
    return Simulator(ode, initial=(sim.mean0, sim.sd0))


def rows(sim: Simulator, copies: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "States a few hours into the stay, actions and hours since admission."
    gen = torch.Generator().manual_seed(seed)
    x = sim.initial(copies, gen)
    u = torch.rand(sim.k, copies, 3, generator=gen, dtype=x.dtype)
    return sim.flow(x, u.flip(1), 4.0), u, 4.0 + 40 * torch.rand(sim.k, copies, generator=gen, dtype=x.dtype)


def inside(sim: Simulator, *states: torch.Tensor) -> torch.Tensor:
    low, high = (torch.tensor(b, dtype=states[0].dtype) for b in (LOW, HIGH))
    return torch.stack([((y >= low) & (y <= high)).all(-1) for y in map(sim.to_physical, states)]).all(0)


@torch.inference_mode()
def compare(sim: Simulator, single: Simulator, copies: int, name: str, seed: int, judged: bool) -> None:
    "Print the table of one batch; `single` is the float32 twin of `sim`."
    x, u, t0 = rows(sim, copies, seed)
    x32, u32, t32 = x.float(), u.float(), t0.float()
    slow, fast = (dict(method="dopri5", **tol) for tol in ({}, dict(rtol=1e-5, atol=1e-7)))
    calls = {
        "dopri5 1e-8 f64 (default)": lambda: flow(sim.rate, x, u, HOURS, t0, **slow),
        "dopri5 1e-5 f64": lambda: flow(sim.rate, x, u, HOURS, t0, **fast),
        "dopri5 1e-5 f32": lambda: flow(single.rate, x32, u32, HOURS, t32, **fast),
        "rk4 fixed 1/8 h f64 (ode)": lambda: flow(sim.rate, x, u, HOURS, t0),
        "rk4 fixed 1/2 h f32": lambda: flow(single.rate, x32, u32, HOURS, t32, step=0.5, first=0.05),
        "surrogate (pinn)": lambda: sim.flow(x, u, HOURS, t0, backend="pinn"),
    }
    done = {label: cpu(call) for label, call in calls.items()}
    reference, quick = done["dopri5 1e-8 f64 (default)"][1], done["surrogate (pinn)"][0]
    ok = inside(sim, x, reference)
    print(f"\n{name}: {x.shape[0] * x.shape[1]} rows, {ok.double().mean():.0%} inside charted bounds")
    for label, (ms, end) in done.items():
        error = f"{(end - reference)[ok].square().mean().sqrt():9.1e}" if judged or "pinn" not in label else "        -"
        print(f"  {label:27s}{ms:10.3f} ms   {ms / quick:8.1f} x the surrogate   error {error} sd")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=1000)
    ap.add_argument("--trajectories", type=int, default=60_000)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--hybrid", action="store_true")
    a = ap.parse_args()
    torch.set_num_threads(1)
    sim = bodies(a)
    start = time.process_time()
    if a.steps:
        config = SurrogateConfig(steps=a.steps, trajectories=a.trajectories)
        sim.surrogate = fit_surrogate(sim.ode, config, seed=a.seed)
        print(f"{a.steps} steps of fitting, {time.process_time() - start:.0f} s of CPU")
    else:
        sim.surrogate = Surrogate(patient_columns(sim.ode)).requires_grad_(False)
    one = sim.select([0])
    for who, copies, name in ((one, 1, "one state"), (sim, 1, "110 patients"), (sim, 64, "110 patients x 64"),
                              (one, 110, "1 patient x 110"), (one, 7040, "1 patient x 7,040")):
        compare(who, copy.deepcopy(who).float(), copies, name, a.seed, bool(a.steps))


if __name__ == "__main__":
    main()
