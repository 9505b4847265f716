"The surrogate: exact at 0 h, its losses by hand, the same weights for the same seed, resumed or not; bad input named."
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.sim.descent import descend, orthogonal
from medsim.sim.hybrid import HybridODE, correction_net
from medsim.sim.odesolve import flow
from medsim.sim.physiology import MedGymODE, SepsisODE, virtual_patients
from medsim.sim.pinn import (
    Surrogate,
    SurrogateConfig,
    Transitions,
    data_loss,
    fit_surrogate,
    mixing,
    patient_columns,
    relaxations,
    with_slope,
)
from medsim.sim.trajectories import Domain, draw_actions, draw_starts, draw_states, pool, spread_hours, trajectories

SMALL = SurrogateConfig(width=16, trajectories=120, steps=12, batch=60)
NEAR = Domain(dt_high=4.0)


def septic(k=3, seed=0):
    return virtual_patients(k, torch.Generator().manual_seed(seed)).requires_grad_(False)


def question(k, n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    domain = Domain()
    return draw_states(domain, k, n, gen), draw_actions(k, n, gen), draw_starts(domain, k, n, gen)


def records(k=3, n=24, seed=0):
    gen = torch.Generator().manual_seed(seed)
    who, (x, u, t0) = torch.arange(n) % k, (v[:, 0] for v in question(n, 1, seed))
    seen = torch.rand(2, n, 6, generator=gen) > 0.3
    return Transitions(who, x, seen[0], u, 0.1 + t0 / 20, t0, 0.5 * x, seen[1])


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@settings(max_examples=10, deadline=None)
@given(width=st.integers(4, 40), modes=st.integers(1, 12), own=st.booleans(), seed=st.integers(0, 99))
def test_it_starts_where_the_patient_is(width, modes, own, seed):
    net = Surrogate(patient_columns(septic()), SurrogateConfig(width=width, modes=modes), own=own, seed=seed)
    x, u, t0 = question(3, 4, seed)
    assert torch.equal(net(x, u, torch.zeros(3, 4), t0), x)


def test_modes_are_orthonormal_over_log_hours():
    hours = spread_hours(Domain(), torch.full((400,), 0.5)).double()
    b = relaxations(hours) @ mixing(Domain(), 8)
    assert torch.allclose(b.T @ b / 400, torch.eye(8, dtype=torch.float64), atol=1e-6)


def test_slope_is_the_derivative():
    net = Surrogate(patient_columns(septic())).double()
    x, u, t0 = (v.double() for v in question(3, 5))
    dt = torch.full((3, 5), 2.0, dtype=torch.float64)
    _, slope = with_slope(net, x, net.coefficients(x, u, t0), dt)
    finite = (net(x, u, dt + 1e-5, t0) - net(x, u, dt - 1e-5, t0)) / 2e-5
    assert torch.allclose(slope, finite, atol=1e-5)


def test_nothing_observed_costs_nothing():
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    assert data_loss(torch.ones(2, 6), torch.full((2, 6), torch.nan), nothing) == 0


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (16, 16)])
def test_orthogonal_brings_singular_values_together(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3 and values.max() < 1.4


def test_descent_leaves_what_has_no_gradient():
    net = torch.nn.Linear(3, 3)
    before = {n: p.clone() for n, p in net.named_parameters()}
    descend(net, {}, 0)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_targets_are_the_solvers():
    ode = septic().float()
    runs = trajectories(ode, Domain(), 3, 2, torch.Generator().manual_seed(0), legs=2, points=5)
    assert runs.x.shape == (3, 4, 6) and runs.y.shape == (3, 4, 6, 5) and runs.dt.shape == (3, 4, 5)
    body = septic()
    x, u, dt, t0 = (v.double() for v in (runs.x, runs.u, runs.dt[..., -1], runs.t0))
    end = flow(body.rate, x, u, dt, t0, method="dopri5")
    assert (runs.y[..., -1] - end).abs().max() < 2e-3
    assert runs.t0.min() >= 0 and runs.t0.max() <= 168 and runs.u.min() >= 0 and runs.u.max() <= 1


def test_pool_is_the_same_again():
    a, b, c = (pool(septic(), Domain(), 30, seed, progress=False) for seed in (0, 0, 1))
    assert torch.equal(a.y, b.y) and not torch.equal(a.y, c.y)


@pytest.mark.parametrize("kind", ["sepsis", "medgym", "hybrid", "stacked"])
def test_same_seed_same_weights(kind):
    ode = {
        "sepsis": septic(), "medgym": MedGymODE(3), "hybrid": HybridODE(SepsisODE(3), correction_net((8,)), level=0.1),
        "stacked": HybridODE(SepsisODE(3), correction_net((8,), seed=[0, 1, 2]), level=0.1),
    }[kind]  # fmt: skip
    a, b = (fit_surrogate(ode, SMALL, domain=NEAR, seed=0, progress=False) for _ in "ab")
    assert same(a, b) and a.k == 3
    assert (a.own is not None) == (kind == "stacked")
    assert not any(p.requires_grad for p in a.parameters())


def test_another_seed_other_weights():
    a, b = (fit_surrogate(septic(), SMALL, domain=NEAR, seed=s, progress=False) for s in (0, 1))
    assert not same(a, b)


def test_it_learns():
    config = SurrogateConfig(width=32, trajectories=1500, steps=300, batch=300)
    history = fit_surrogate(septic(), config, domain=NEAR, progress=False, every=30).history
    assert history[-1]["held_out"] < 0.4 * history[0]["held_out"]
    assert set(history[0]) == {"step", "solver", "ode", "semigroup", "held_out"}


def stop_at(step):
    def log(said):
        if said["step"] == step: raise KeyboardInterrupt

    return log


def test_resumed_equals_uninterrupted(tmp_path):
    how = dict(transitions=records(), domain=NEAR, progress=False, every=4)
    whole = fit_surrogate(septic(), SMALL, **how)
    for stop in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            fit_surrogate(septic(), SMALL, checkpoint=tmp_path / "run", log=stop_at(stop), **how)
        assert [f.name for f in (tmp_path / "run").iterdir()] == [f"step-{stop:09d}"]
    resumed = fit_surrogate(septic(), SMALL, checkpoint=tmp_path / "run", **how)
    assert same(whole, resumed) and whole.history == resumed.history


@pytest.mark.parametrize("change", [dict(seed=1), dict(domain=Domain(dt_high=3.0)), dict(transitions=records())])
def test_another_run_does_not_go_on(tmp_path, change):
    how = dict(progress=False, checkpoint=tmp_path / "run", domain=NEAR)
    fit_surrogate(septic(), SMALL, **how)
    with pytest.raises(ValueError, match="checkpoint of another run"):
        fit_surrogate(septic(), SMALL, **how | change)


def test_some_patients_and_others():
    ode, net = septic(5), fit_surrogate(septic(5), SMALL, domain=NEAR, progress=False)
    x, u, t0 = question(5, 2)
    dt = torch.full((5, 2), 3.0)
    both = net.flow(x, u, dt, t0)
    few = net.select(torch.tensor([4, 1]))
    assert few.k == 2 and torch.allclose(few.flow(x[[4, 1]], u[[4, 1]], dt[:2], t0[[4, 1]]), both[[4, 1]], atol=1e-5)
    again = net.of(ode)
    assert torch.allclose(again.flow(x, u, dt, t0), both, atol=1e-5)
    assert net.of(septic(2, seed=9)).flow(x[:2], u[:2], dt[:2], t0[:2]).shape == (2, 2, 6)


@pytest.mark.parametrize("shape", [(1, 3000), (50, 60), (3000, 1)])
def test_pieces_make_the_whole(shape):
    net = Surrogate(patient_columns(SepsisODE(shape[0])), SurrogateConfig(width=8)).settle()
    x, u, t0 = question(*shape)
    dt = 30 * torch.rand(shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(net.in_pieces(x, u, dt, t0), net(x, u, dt, t0), atol=1e-5)


def test_long_intervals_are_made_of_stretches():
    net = fit_surrogate(septic(), SMALL, domain=NEAR, progress=False)
    x, u, t0 = question(3, 2)
    four = torch.full((3, 2), 4.0)
    long = net.flow(x, u, torch.tensor([[9.0, 3.0]] * 3), t0)
    step = net(net(net(x, u, four, t0), u, four, t0 + 4), u, four - 3, t0 + 8)
    assert torch.allclose(long[:, 0], step[:, 0], atol=1e-4)
    assert torch.allclose(long[:, 1], net(x, u, four - 1, t0)[:, 1], atol=1e-5)


def test_starts_beyond_the_domain_are_refused():
    net = Surrogate(patient_columns(septic()))
    x, u, t0 = question(3, 1)
    with pytest.raises(ValueError, match="0 to 168 h"):
        net.flow(x, u, t0 + 1, t0 + 200)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t._replace(dt=0 * t.dt), "dt must be positive"), (lambda t: t._replace(k=t.k + 3), "0 to 2"),
        (lambda t: t._replace(x=t.x * torch.nan), "x must have"), (lambda t: t._replace(u=t.u + 2), "u must lie"),
        (lambda t: t._replace(t0=t.t0[1:]), "t0 must have"), (lambda t: Transitions(*(v[:0] for v in t)), "one row"),
    ],
)  # fmt: skip
def test_bad_transitions_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        fit_surrogate(septic(), SMALL, transitions=change(records()), progress=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SurrogateConfig(width=0), lambda: SurrogateConfig(modes=17), lambda: SurrogateConfig(ode=-1.0),
        lambda: SurrogateConfig(share=0.0), lambda: Domain(dt_low=0.0), lambda: Domain(spread=(0.0,) * 6),
        lambda: Domain(centre=(0.0,)),
    ],
)  # fmt: skip
def test_impossible_settings(make):
    with pytest.raises(ValueError):
        make()


def test_nothing_half_written(tmp_path, monkeypatch):
    def fail(*_, **__): raise OSError("disk full")

    monkeypatch.setattr("medsim.sim.pinn.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        fit_surrogate(septic(), SMALL, domain=NEAR, progress=False, checkpoint=tmp_path / "run")
    assert not list(Path(tmp_path, "run").iterdir())
