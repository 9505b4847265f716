"What a simulator believes about treatment: contrasts, intervals, contradictions, the flag."
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.sim.hybrid import HybridODE, correction_net
from medsim.sim.physiology import ACTIONS, STATES, MedGymODE, SepsisODE, virtual_patients
from medsim.sim.response import (
    CLAIMS,
    PRIOR_SIGNS,
    ResponseWarning,
    check_responses,
    contradictions,
    contrasts,
    patient_means,
    patients_of,
    plot_responses,
    response_table,
    responses,
    septic_states,
)

F64 = torch.float64
QUICK = dict(horizon_h=(2.0,), n_boot=50)


class Linear:
    "K patients whose state moves at a rate that depends on the dose alone."

    def __init__(self, gain):  # (K, 3, 6) per hour
        self.gain, self.k = gain, len(gain)

    def rate(self, x, u, t):
        return u @ self.gain

    def to_physical(self, x):
        return x

    def to_normalised(self, y):
        return y


def test_prior_signs_and_reasons():
    assert PRIOR_SIGNS.shape == (6, 3) and list(PRIOR_SIGNS.index) == list(STATES)
    assert {(c.state, c.action): c.sign for c in CLAIMS} == {
        ("spo2", "fio2"): 1, ("pao2", "fio2"): 1, ("lactate", "vasopressor"): -1, ("lactate", "fluid"): -1,
        ("urine", "fluid"): 1,
    }  # fmt: skip
    assert all(len(c.reason) > 20 for c in CLAIMS)


def test_only_one_treatment_moves():
    u = contrasts((0.5, 0.1, 50.0), (0.9, 0.2, 100.0))
    assert u.shape == (4, 3)
    assert torch.equal((u != u[0]).int()[1:], torch.eye(3, dtype=torch.int))


@pytest.mark.parametrize(
    "low, high, word",
    [((0.4, 0, 0), (0.4, 0.1, 100), "fio2"), ((0.4, 0, 0), (0.6, 0.1, 0), "fluid"),
     ((0.4, 0, 0), (0.6, 0.7, 100), "vasopressor"), ((0.4, 0), (0.6, 0.1), "three")],
)  # fmt: skip
def test_bad_doses_are_named(low, high, word):
    with pytest.raises(ValueError, match=word): contrasts(low, high)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_a_linear_model_gives_its_gain(k, b, seed):
    gen = torch.Generator().manual_seed(seed)
    gain, x = torch.randn(k, 3, 6, generator=gen, dtype=F64), torch.randn(k, b, 6, generator=gen, dtype=F64)
    change = responses(Linear(gain), x, horizon_h=(1.0, 3.0))
    step = (contrasts()[1:] - contrasts()[0]).diagonal()
    expected = (gain * step[:, None]).transpose(0, 1)
    assert torch.allclose(change[0], expected[:, :, None].expand(3, k, b, 6), atol=1e-9)
    assert torch.allclose(change[1], 3 * change[0], atol=1e-9)


def test_time_of_each_state_counts():
    "Perfusion is short on the first day and not a week later, so vasopressor lowers lactate less."
    ode = SepsisODE().requires_grad_(False)
    x = septic_states(ode, 2)
    change = responses(ode, x, torch.tensor([[0.0, 168.0]], dtype=F64), horizon_h=(6.0,))[0, 1, 0, :, 5]
    early = responses(ode, x[:, :1], 0.0, horizon_h=(6.0,))[0, 1, 0, 0, 5]
    assert torch.isclose(change[0], early) and change[0] < 2 * change[1] < 0


def test_patients_are_the_unit():
    "Twenty states of two patients are two, not twenty."
    gain = torch.zeros(2, 3, 6, dtype=F64)
    gain[1, 0, 1] = 1.0
    table = response_table(Linear(gain), torch.zeros(2, 10, 6, dtype=F64), horizon_h=(1.0,))
    row = table.query("action == 'fio2' and state == 'pao2'").iloc[0]
    assert row.patients == 2 and row.ci_low == 0 and np.isclose(row.ci_high, 2 * row.change)


def test_one_population_patient_in_the_states_of_many():
    groups = np.array([[1, 1, 2]])
    assert patients_of(1, 3).tolist() == [0, 1, 2] and patients_of(1, 3, groups).tolist() == [1, 1, 2]
    assert patient_means(np.array([[1.0], [3.0], [8.0]]), groups[0]).tolist() == [[2.0], [8.0]]
    with pytest.raises(ValueError, match="shape"): patients_of(2, 3, groups)
    with pytest.raises(ValueError, match="two"): response_table(SepsisODE(), septic_states(SepsisODE(), 1))


@pytest.mark.parametrize("hours", [(), (0.0,), (6.0, 2.0), (2.0, 2.0), (float("inf"),), (float("nan"),)])
def test_bad_horizons(hours):
    with pytest.raises(ValueError, match="horizon"): responses(SepsisODE(), septic_states(SepsisODE()), horizon_h=hours)


@pytest.fixture(scope="module")
def tables():
    gen = torch.Generator().manual_seed(1)
    both = {"sepsis": virtual_patients(12, gen).requires_grad_(False), "medgym": MedGymODE(12).requires_grad_(False)}
    both["medgym"].theta.data = 0.5 * torch.randn(12, 10, generator=gen, dtype=F64)
    return {name: response_table(ode, septic_states(ode, 4), n_boot=100) for name, ode in both.items()}


def test_table_of_beliefs(tables):
    t = tables["sepsis"]
    assert len(t) == 36 and set(t.action) == set(ACTIONS) and set(t.horizon_h) == {6.0, 24.0}
    assert (t.ci_low <= t.change).all() and (t.change <= t.ci_high).all()


def test_sepsis_agrees_medgym_contradicts(tables):
    assert contradictions(tables["sepsis"]).empty
    found = contradictions(tables["medgym"])
    assert set(zip(found.state, found.action, strict=True)) == {("lactate", "vasopressor")}


def test_zero_is_ignorance_not_contradiction():
    still = Linear(torch.zeros(3, 3, 6, dtype=F64))
    assert contradictions(response_table(still, torch.zeros(3, 1, 6, dtype=F64), **QUICK)).empty


@given(st.floats(-2, 2), st.floats(0, 1), st.sampled_from([-1, 0, 1]))
def test_contradiction_is_the_whole_interval(change, half, prior):
    table = pd.DataFrame([dict(change=change, ci_low=change - half, ci_high=change + half, prior=prior)])
    wrong = prior != 0 and change * prior < 0 and abs(change) > half
    assert len(contradictions(table)) == wrong


def test_the_flag():
    net = correction_net((4,), acts=True)
    for p in net.parameters(): p.data.zero_()
    net.weight[0].data[7, 0] = net.weight[1].data[0, 5] = 1.0
    taught = HybridODE(SepsisODE(2, dtype=torch.float32), net, acts=True).requires_grad_(False)
    with pytest.warns(ResponseWarning, match="vasopressor 0 to 0.1 ug/kg/min raises lactate"):
        found = check_responses(taught, **QUICK)
    assert json.loads(json.dumps(found)) == found
    assert [(r["state"], r["action"]) for r in found] == [("lactate", "vasopressor")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_responses(HybridODE(SepsisODE(2)).requires_grad_(False), **QUICK) == []


def test_figure(tables):
    fig = plot_responses(tables, 24.0)
    assert len(fig.axes) == 18
    with pytest.raises(ValueError, match="no horizon of 5 h"): plot_responses(tables, 5.0)
    with pytest.raises(ValueError, match="1 to 6"): plot_responses({})
