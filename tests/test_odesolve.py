"The solver: reference numbers, what a flow must satisfy, integrals between visits, and mistakes named."
import math

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.sim.condition import Septic
from medsim.sim.odesolve import DivergenceError, carry, edges, flow, path, unit_time, warm_up, with_zeros
from medsim.sim.outcome import outcome as outcome_of
from medsim.sim.physiology import MedGymODE, SepsisODE, cost_rate, project, reward_rate, virtual_patients

F64 = torch.float64


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def septic(ode):
    return ode.to_normalised(tensor([[91.0, 65, 1.6, 11, 600, 4.5]])).detach()


def outcome(ode, x, u, dt, t0=0.0, oxygen_penalty=0.0, **how):
    return outcome_of(Septic(ode, oxygen_penalty=oxygen_penalty), x, u, dt, t0, **how)


def peak(o):
    "Highest lactate, mmol/L."
    return 4 + o.worst[..., 0]


def bodies(n, seed):
    "Both models with `n` patients, random states that can be charted, random actions."
    gen = torch.Generator().manual_seed(seed)
    pair = virtual_patients(n, gen).requires_grad_(False), MedGymODE(n).requires_grad_(False)
    pair[1].theta.data = torch.randn(n, 10, generator=gen, dtype=F64)
    x = pair[0].to_normalised(project(pair[0].to_physical(torch.randn(n, 1, 6, generator=gen, dtype=F64))))
    return pair, x, torch.rand(n, 1, 3, generator=gen, dtype=F64)


# ---- reference numbers


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_36_hours_at_once(method):
    x = flow(MedGymODE().rate, tensor([[-1, -1, 0.5, -0.5, -0.5, 1.5]]), tensor([[0.5, 0.5, 0.2]]), 36.0, method=method)
    assert abs(x[0, 0, 1] - 0.427) < 1e-3 and abs(x[0, 0, 5] - 0.460) < 1e-3


def test_table_of_constant_actions():
    ode = SepsisODE().requires_grad_(False)
    u = tensor([0, 0, 0], [0.35, 0.25, 0.3], [0.35, 0, 0.8], [0.35, 0.9, 0.1], [1, 1, 1])[None]
    stay = outcome(ode, septic(ode).expand(1, 5, 6), u, 96.0, step=0.25)
    assert np.allclose(stay.severity / 96, [[10.78, 4.99, 4.07, 7.75, 8.9]], atol=0.02)
    assert np.allclose(1 - stay.cost / 96, [[0, 0.96, 0.63, 0.66, 0.44]], atol=0.01)


def test_violation_hidden_between_visits():
    ode = SepsisODE(severity=3.0, tau=48.0).requires_grad_(False)
    before = outcome(ode, septic(ode), tensor([[0.35, 0.6, 0.3]]), 30.0, step=0.25)
    later = outcome(ode, before.x, tensor([[0.35, 0, 0]]), 66.0, 30.0, step=0.25)
    visits = [ode.to_physical(o.x)[0, 0, 5] for o in (before, later)]
    assert np.allclose(visits, [3.56, 2.51], atol=0.01) and not any(v > 4 for v in visits)
    assert later.violated.item() and abs(peak(later).item() - 4.66) < 0.01 and later.cost.item() > 20


# ---- what a flow must satisfy

hours = st.floats(0.5, 36)


@settings(max_examples=4, deadline=None)
@given(s=hours, t=hours, seed=st.integers(0, 10**6))
def test_no_seam(s, t, seed):
    pair, x, u = bodies(60, seed)
    for ode in pair:
        middle, end = flow(ode.rate, x, u, s), flow(ode.rate, x, u, s + t)
        gap = (flow(ode.rate, middle, u, t, s) - end).abs().amax(-1)
        # saturation has a corner at 15 mmHg; who falls through it in the seam's first half hour may keep more
        corner = (ode.to_physical(torch.minimum(middle, end))[..., 1] < 15) & isinstance(ode, SepsisODE)
        assert gap[~corner].max() < 1e-4 and gap.max() < 2e-3


@settings(max_examples=8, deadline=None)
@given(t0=st.floats(0, 500), dt=hours, seed=st.integers(0, 10**6))
def test_medgym_does_not_know_the_hour(t0, dt, seed):
    (_, ode), x, u = bodies(20, seed)
    assert (flow(ode.rate, x, u, dt, t0) - flow(ode.rate, x, u, dt)).abs().max() < 1e-4


def test_a_thousand_hours_at_any_dose():
    "Virtual patients on 8 extreme and 8 random treatments: bounded, at rest in the end, never NaN."
    gen = torch.Generator().manual_seed(0)
    ode = virtual_patients(12, gen).requires_grad_(False)
    corners = torch.cartesian_prod(*3 * [tensor(0.0, 1.0)])
    u = torch.cat([corners, torch.rand(8, 3, generator=gen, dtype=F64)]).expand(12, 16, 3)
    x = ode.to_normalised(project(ode.to_physical(2 * torch.randn(12, 16, 6, generator=gen, dtype=F64))))
    states = path(ode.rate, x, u, tensor(*range(100, 1001, 100)), step=1.0)
    assert torch.isfinite(states).all() and states.abs().max() < 150
    assert (states[-1] - states[-2]).abs().max() < 0.05


def test_rk4_against_the_reference():
    pair, x, u = bodies(20, 1)
    for ode in pair:
        for dt in (0.5, 4.0, 24.0):
            gap = flow(ode.rate, x, u, dt) - flow(ode.rate, x, u, dt, method="dopri5", rtol=1e-8)
            assert gap.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alone_or_in_company(dtype):
    ode = virtual_patients(7, torch.Generator().manual_seed(3), dtype=dtype).requires_grad_(False)
    alone = SepsisODE(dtype=dtype).requires_grad_(False)
    alone.theta.data = ode.theta.data[4:5]
    gen = torch.Generator().manual_seed(4)
    x, u = torch.randn(7, 3, 6, generator=gen, dtype=dtype), torch.rand(7, 3, 3, generator=gen, dtype=dtype)
    dt = 0.5 + 20 * torch.rand(7, 3, generator=gen, dtype=dtype)
    t0 = 50 * torch.rand(7, 3, generator=gen, dtype=dtype)
    here = slice(4, 5), slice(1, 2)
    together, single = outcome(ode, x, u, dt, t0), outcome(alone, x[here], u[here], dt[here], t0[here])
    pairs = zip(together, single, strict=True)
    assert all(torch.allclose(a[here], b, rtol=30 * torch.finfo(dtype).eps) for a, b in pairs)
    assert torch.equal(together.x[here], single.x)  # the states to the last bit, sums over steps to rounding
    assert torch.equal(together.x, flow(ode.rate, x, u, dt, t0))


@given(
    dt=st.lists(st.floats(0, 40), min_size=1, max_size=4), t0=st.floats(0, 200),
    step=st.sampled_from([0.125, 0.25, 0.5, 1.0]), first=st.floats(0.001, 2),
)  # fmt: skip
def test_steps(dt, t0, step, first):
    dt = tensor(dt)
    cut = edges(dt, t0 + 0 * dt, step, first)
    length = cut.diff(dim=0)
    assert (cut[0] == 0).all() and torch.allclose(cut[-1], dt, atol=1e-9) and (length >= 0).all()
    assert not length.numel() or length.max() <= step * (1 + 1e-9)
    full = (cut[1:-1] >= warm_up(step, first)[-1] + step) & (cut[1:-1] < dt)
    beat = (t0 + cut[1:-1][full]) / step
    assert (beat - beat.round()).abs().max() < 1e-6 if full.any() else True


def test_gradients_through_the_flow():
    gen = torch.Generator().manual_seed(5)
    for ode in (virtual_patients(1, gen), MedGymODE(1)):
        ode.forward = ode.rate

        def solved(x, u, theta, dt, ode=ode):
            def rate(x, u, t): return torch.func.functional_call(ode, {"theta": theta}, (x, u, t))

            return flow(rate, x, u, dt, step=0.5, first=0.2)

        x, u = torch.randn(1, 1, 6, generator=gen, dtype=F64), torch.rand(1, 1, 3, generator=gen, dtype=F64)
        inputs = [v.detach().clone().requires_grad_() for v in (x, u, ode.theta, tensor([0.9]))]
        assert torch.autograd.gradcheck(solved, inputs)


# ---- doses that change


def test_path_is_made_of_flows():
    ode = SepsisODE().requires_grad_(False)
    u = torch.rand(3, 1, 1, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    states = path(ode.rate, septic(ode), u, tensor(0.0, 3.0, 8.0), t0=5.0)
    assert torch.equal(states[0], septic(ode))
    first = flow(ode.rate, septic(ode), u[1], 3.0, 5.0)
    assert torch.equal(states[1], first) and torch.equal(states[2], flow(ode.rate, first, u[2], 5.0, 8.0))


def test_infusions_on_the_patients_own_clocks():
    (ode, _), x, _ = bodies(4, 7)
    gen = torch.Generator().manual_seed(8)
    u, times = torch.rand(5, 4, 1, 3, generator=gen, dtype=F64), 10 * torch.rand(5, 4, 1, generator=gen, dtype=F64)
    times = times.sort(dim=0).values
    ours, reference = (path(ode.rate, x, u, times, method=m) for m in ("rk4", "dopri5"))
    assert (ours - reference).abs().max() < 1e-4


# ---- what came of an interval


@settings(max_examples=5, deadline=None)
@given(s=st.floats(0.5, 12), t=st.floats(0.5, 12), t0=st.floats(0, 50), seed=st.integers(0, 10**6))
def test_two_outcomes_make_one(s, t, t0, seed):
    (ode, _), x, u = bodies(20, seed)
    a = outcome(ode, x, u, s, t0, oxygen_penalty=0.2)
    b, whole = outcome(ode, a.x, u, t, t0 + s, oxygen_penalty=0.2), outcome(ode, x, u, s + t, t0, oxygen_penalty=0.2)
    assert torch.allclose(a.discounted + 0.997**s * b.discounted, whole.discounted, atol=1e-3)
    assert torch.allclose(a.reward + b.reward, whole.reward, atol=1e-3)
    assert torch.allclose(a.severity + b.severity, whole.severity, atol=1e-3)
    assert torch.allclose(a.cost + b.cost, whole.cost, atol=0.02)
    assert torch.allclose(torch.maximum(peak(a), peak(b)), peak(whole), atol=2e-3)
    for o in (a, b, whole):
        assert torch.equal(o.violated, o.cost > 0) and torch.equal(o.violated, peak(o) > 4)
        assert (o.cost >= 0).all() and (o.reward <= 0).all() and (o.severity >= 0).all()


def test_outcome_against_the_reference():
    (ode, _), x, u = bodies(20, 2)
    gen = torch.Generator().manual_seed(3)
    dt, t0 = 0.5 + 23.5 * torch.rand(20, 1, generator=gen, dtype=F64), 48 * torch.rand(20, 1, generator=gen, dtype=F64)
    got = outcome(ode, x, u, dt, t0, gamma=0.99)

    def reward(x, u, t): return (reward_rate(ode.to_physical(x), u) * 0.99 ** (t - t0)).unsqueeze(-1)

    exact = flow(carry(ode.rate, reward), with_zeros(x, 1), u, dt, t0, method="dopri5")[..., 6]
    s = torch.linspace(0, 1, 4001, dtype=F64)
    lactate = ode.to_physical(torchdiffeq.odeint(unit_time(ode.rate, u, dt, t0), x, s, rtol=1e-8, atol=1e-10))[..., 5]
    assert (got.discounted - exact).abs().max() < 1e-3
    assert (peak(got) - lactate.amax(0)).abs().max() < 1e-3 and (peak(got) <= lactate.amax(0) + 1e-5).all()
    assert (got.cost - (lactate > 4).double().mean(0) * dt).abs().max() < 0.05


def test_cost_of_an_outcome_is_the_carried_indicator():
    (ode, _), x, u = bodies(20, 4)
    z = flow(carry(ode.rate, lambda x, u, t: cost_rate(ode.to_physical(x)).unsqueeze(-1)), with_zeros(x, 1), u, 12.0)
    assert (outcome(ode, x, u, 12.0).cost - z[..., 6]).abs().max() < 0.2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_single_precision_and_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (ode, _), x, u = bodies(6, 5)
    exact = outcome(ode, x, u, 12.0, 3.0)
    got = outcome(ode.to(device, torch.float32), *(v.float().to(device) for v in (x, u)), 12.0, 3.0)
    assert all(v.device.type == device for v in got) and got.x.dtype == got.reward.dtype == torch.float32
    assert (got.x.cpu() - exact.x).abs().max() < 1e-4 and (got.reward.cpu() - exact.reward).abs().max() < 1e-2
    times = torch.tensor([1.0, 2.0], device=device)
    assert path(ode.rate, x.float().to(device), u.float().to(device), times).dtype == torch.float32


# ---- mistakes


@pytest.mark.parametrize("dt", [0.0, -1.0, math.nan, math.inf])
def test_time_must_move(dt):
    for call in (lambda ode, *a: flow(ode.rate, *a), outcome):
        with pytest.raises(ValueError, match="dt must be positive"):
            call(SepsisODE(), torch.zeros(1, 1, 6, dtype=F64), torch.zeros(1, 1, 3, dtype=F64), dt)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", ["state x", "dose u", "time t0"])
def test_nan_at_the_start_is_named(at, bad):
    (ode, _), x, u = bodies(3, 0)
    t0 = torch.zeros(3, 1, dtype=F64)
    dict(zip(("state x", "dose u", "time t0"), (x, u, t0), strict=True))[at].view(3, -1)[2, 0] = bad
    for call in (lambda: flow(ode.rate, x, u, 1.0, t0), lambda: outcome(ode, x, u, 1.0, t0),
                 lambda: path(ode.rate, x, u, tensor(1.0, 2.0), t0)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{at} is NaN or infinite at index \(2, 0"):
            call()


def test_nan_in_a_parameter_is_found_with_its_patient():
    (ode, _), x, u = bodies(3, 0)
    ode.theta.data[1, 3] = math.nan
    for call in (lambda: flow(ode.rate, x, u, 1.0), lambda: outcome(ode, x, u, 1.0),
                 lambda: path(ode.rate, x, u, tensor(1.0, 2.0))):  # fmt: skip
        with pytest.raises(DivergenceError, match=r"\(1, 0\)"):
            call()
    with pytest.raises(ValueError, match=r"w_i.*patient \[1\]"):
        ode.check_parameters()


def test_divergence_names_its_patient():
    def explode(x, u, t):
        return 1e3 * x**3

    x = torch.zeros(3, 2, 1, dtype=F64)
    x[1, 1] = 1.0
    with pytest.raises(DivergenceError, match=r"\(1, 1\)") as e:
        flow(explode, x, torch.zeros(3, 2, 3, dtype=F64), 2.0)
    assert e.value.where == [(1, 1)]


def test_other_mistakes():
    ode = SepsisODE().requires_grad_(False)
    x, u = septic(ode), tensor([[0.3, 0.1, 0.1]])
    for message, call in (
        ("unknown solver 'euler'", lambda: flow(ode.rate, x, u, 1.0, method="euler")),
        ("steps must be positive", lambda: flow(ode.rate, x, u, 1.0, step=0.0)),
        ("steps must be positive", lambda: flow(ode.rate, x, u, 1.0, first=math.nan)),
        ("gamma must lie in", lambda: outcome(ode, x, u, 1.0, gamma=0.0)),
        ("gamma must lie in", lambda: outcome(ode, x, u, 1.0, gamma=math.nan)),
        ("never decrease", lambda: path(ode.rate, x, u, tensor(2.0, 1.0))),
        ("2 doses for 3 times", lambda: path(ode.rate, x, u.expand(2, 1, 1, 3), tensor(1.0, 2.0, 3.0))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
