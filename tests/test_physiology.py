"The rates, the score and the units of the patients: by hand, at their bounds, and refused where impossible."
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsim.sim.physiology import (
    ACTIONS,
    MEDGYM,
    SEPSIS,
    MedGymODE,
    Physiology,
    SepsisODE,
    check_action,
    cost_rate,
    project,
    reward_rate,
    smooth_sofa,
    sofa_organs,
    to_actions,
    to_doses,
    virtual_patients,
)

F64 = torch.float64


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def soft(x, b):
    return math.log1p(math.exp(b * x)) / b


def sepsis_by_hand(x, u, t):
    "The six rates written with plain numbers, one state."
    o, p, b, g, ur, lac = x
    f, v, i = u
    ov, rho = soft(i - 0.35, 20), lambda z: soft(z, 5)
    d = rho(2 * math.exp(-t / 60) - 1.2 * v / (v + 0.2) - 0.8 * i / (i + 0.2) + 1.5 * ov)
    held = max(110 + 50 * p, 15) ** 2.7
    return [
        (100 * held / (held + 26.8**2.7) - 96) / 4 - o,
        0.5 * (-1.1 + 4.1 * f - p) - 0.05 * rho(lac) + 0.05 * i - 0.5 * ov,
        0.02 * rho(lac) + 0.01 * d - (b + 0.4) / 48,
        -0.044 * rho(lac) - 0.05 * rho(-o) + (1 - g) / 24,
        -ur / 6 + 0.15 * i - 0.06 * rho(lac) - 0.08 * v - 0.085 * d - 0.3 * ov,
        0.2 * d + 0.3 * soft(v - 0.3, 20) + 0.05 * rho(-o) - 0.15 * (lac + 0.65) - 0.03 * i * (lac + 1.1),
    ]


def medgym_by_hand(x, u):
    o, p, b, g, ur, lac = x
    f, v, i = u
    shock, hypoxia = max(lac, 0), max(-o, 0)
    rates = [
        0.15 * (p - o), 0.25 * (f - p) - 0.05 * lac + 0.025 * i, 0.025 * shock - 0.05 * max(b, 0),
        -0.05 * shock - 0.05 * hypoxia, 0.25 * i - 0.05 * shock - 0.05 * v,
        0.25 * v + 0.05 * hypoxia - 0.25 * shock - 0.05 * i,
    ]  # fmt: skip
    return np.clip(rates, [-1, -2, -0.2, -0.5, -2, -2], [1, 2, 0.2, 0.5, 2, 2])


states = st.lists(st.floats(-4, 4), min_size=6, max_size=6)
actions = st.lists(st.floats(0, 1), min_size=3, max_size=3)


@given(x=states, u=actions, t=st.floats(0, 200))
def test_rates_by_hand(x, u, t):
    sepsis, medgym = SepsisODE().requires_grad_(False), MedGymODE().requires_grad_(False)
    assert np.allclose(sepsis.rate(tensor([x]), tensor([u]), t).flatten(), sepsis_by_hand(x, u, t), atol=1e-10)
    assert np.allclose(medgym.rate(tensor([x]), tensor([u]), t).flatten(), medgym_by_hand(x, u), atol=1e-12)


@given(x=states, u=actions, t=st.floats(0, 1e4))
def test_medgym_does_not_know_the_hour(x, u, t):
    ode = MedGymODE().requires_grad_(False)
    assert torch.equal(ode.rate(tensor([x]), tensor([u]), t), ode.rate(tensor([x]), tensor([u])))


@pytest.mark.parametrize("make", [lambda g: virtual_patients(2, g), lambda g: MedGymODE(2)])
def test_gradients(make):
    gen = torch.Generator().manual_seed(0)
    ode = make(gen)
    ode.forward = ode.rate
    x, u = torch.randn(2, 2, 6, generator=gen, dtype=F64), torch.rand(2, 2, 3, generator=gen, dtype=F64)

    def rate(x, u, theta):
        return torch.func.functional_call(ode, {"theta": theta}, (x, u, 3.0))

    inputs = [v.detach().clone().requires_grad_() for v in (x, u, ode.theta)]
    assert torch.autograd.gradcheck(rate, inputs)


def test_score_in_health_in_sepsis_and_at_worst():
    y = tensor([98, 100, 0.7, 15, 1800, 1.0], [92, 60, 3.5, 9.75, 1050, 5.5], [50, 20, 30, 3, 0, 20])
    assert np.allclose(smooth_sofa(y, tensor(0, 0.25, 0.5)), [0.184, 8.785, 17.993], atol=1e-3)
    assert np.allclose(sofa_organs(y[2], 0.5), [4, 4, 4, 1.993, 4], atol=1e-3)


@given(x=states, u=actions)
def test_score_is_bounded_and_is_its_organs(x, u):
    ode = SepsisODE().requires_grad_(False)
    y, u = ode.to_physical(tensor(x)), tensor(u)
    organs = sofa_organs(y, 0.5 * u[:, 1])
    assert (organs >= 0).all() and (organs <= tensor([4, 4, 4, 2, 4])).all()
    assert torch.allclose(organs.sum(-1), smooth_sofa(y, 0.5 * u[:, 1]))
    assert torch.allclose(reward_rate(y, u, 0.2), -organs.sum(-1) - 0.2 * u[:, 1] - 0.2 * (u[:, 0] - 0.5).relu())


def test_cost_is_lactate_beyond_its_limit():
    y = tensor([90, 60, 2, 12, 900, 3.99], [90, 60, 2, 12, 900, 6])
    assert cost_rate(y).tolist() == [0, 1] and cost_rate(y, soft=True).tolist() == [0, 2]


@given(u=actions)
def test_doses_there_and_back(u):
    assert torch.allclose(to_actions(to_doses(tensor(u))), tensor(u))


@given(x=states)
def test_units_there_and_back(x):
    ode = SepsisODE().requires_grad_(False)
    assert torch.allclose(ode.to_normalised(ode.to_physical(tensor(x))), tensor(x))
    assert torch.equal(project(project(ode.to_physical(tensor(x)))), project(ode.to_physical(tensor(x))))


below, beyond = st.floats(max_value=0, exclude_max=True), st.floats(min_value=1, exclude_min=True)


@given(u=actions, at=st.integers(0, 2), bad=st.one_of(below, beyond, st.just(math.nan)))
def test_an_impossible_action_is_refused(u, at, bad):
    assert check_action(tensor(u)).tolist() == [u]
    u[at] = bad
    with pytest.raises(ValueError, match=ACTIONS[at]) as e:
        check_action(tensor([0.5, 0.5, 0.5], u))
    assert not any(name in str(e.value) for name in ACTIONS if name != ACTIONS[at])


def test_an_action_of_two_components_is_refused():
    with pytest.raises(ValueError, match="3 components"):
        check_action(torch.zeros(1, 2))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e-4, 21.0, -1.0])
@pytest.mark.parametrize("name", ["severity", "tau", "lung_intercept"])
def test_coefficients_out_of_range(name, bad):
    with pytest.raises(ValueError, match=f"coefficient.*{name}"):
        SepsisODE(**{name: torch.tensor([1.0, bad], dtype=F64) * SEPSIS[name]})


@pytest.mark.parametrize("make", [SepsisODE, MedGymODE])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_parameters_that_are_not_numbers_are_not_loaded(make, bad):
    state = make(3).state_dict()
    state["theta"][1, 2] = bad
    with pytest.raises(ValueError, match=rf"{list(MEDGYM if make is MedGymODE else SEPSIS)[2]}.*patient \[1\]"):
        make(3).load_state_dict(state)


def test_shapes_of_parameters():
    with pytest.raises(ValueError, match=r"\(K, n\)"):
        Physiology(torch.zeros(3))
    with pytest.raises(ValueError, match="2 patients.*'tau': 3"):
        SepsisODE(2, tau=torch.full((3,), 60.0))
    with pytest.raises(ValueError, match="unknown coefficients.*saverity"):
        SepsisODE(saverity=2.0)


def test_virtual_patients_by_seed():
    a, b, c = (virtual_patients(50, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.theta, b.theta) and not torch.equal(a.theta, c.theta)
    w_i = a.coefficients()["w_i"]
    assert w_i.min() >= 0.3 and w_i.max() <= 1.2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_single_precision_and_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    gen = torch.Generator(device).manual_seed(0)
    ode = virtual_patients(4, gen, dtype=torch.float32).requires_grad_(False).to(device)
    x, u = torch.randn(4, 2, 6, generator=gen, device=device), torch.rand(4, 2, 3, generator=gen, device=device)
    y = ode.to_physical(x)
    for value in (ode.rate(x, u, 3.0), ode.rate(x, u, torch.ones(4, 2, device=device)), project(y), reward_rate(y, u),
                  cost_rate(y), to_doses(u), check_action(u)):  # fmt: skip
        assert value.dtype == torch.float32 and value.device.type == device
