"The simulators: reference numbers, flow properties, and the synthetic cohort read back."
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.data.store import extract
from medsim.sim.course import SEEN, level_probabilities, targets
from medsim.sim.mimic_layout import COLUMNS
from medsim.sim.odesolve import DivergenceError, carry, flow, path, with_zeros
from medsim.sim.physiology import (
    MedGymODE,
    SepsisODE,
    check_action,
    cost_rate,
    medgym_rate,
    smooth_sofa,
    to_actions,
    to_doses,
    virtual_patients,
)
from medsim.sim.synthetic import pressors, write_cohort

SAMPLE = Path(__file__).parents[1] / "data_samples"
F64 = torch.float64


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def septic(ode):
    return ode.to_normalised(tensor([[91.0, 65, 1.6, 11, 600, 4.5]])).detach()


def bodies(n, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, generator=gen, dtype=F64)
    u = torch.rand(n, 1, 3, generator=gen, dtype=F64)
    med = MedGymODE(n).requires_grad_(False)
    return (virtual_patients(n, gen).requires_grad_(False), med), x, u


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_36_hours_at_once(method):
    x = flow(MedGymODE().rate, tensor([[-1, -1, 0.5, -0.5, -0.5, 1.5]]), tensor([[0.5, 0.5, 0.2]]), 36.0, method=method)
    assert abs(x[0, 0, 1] - 0.427) < 1e-3 and abs(x[0, 0, 5] - 0.460) < 1e-3


def test_table_of_constant_actions():
    ode = SepsisODE().requires_grad_(False)
    u = tensor([0, 0, 0], [0.35, 0.25, 0.3], [0.35, 0, 0.8], [0.35, 0.9, 0.1], [1, 1, 1])[None]

    def score(x, u, t):
        y = ode.to_physical(x)
        return torch.stack([smooth_sofa(y, 0.5 * u[..., 1]), cost_rate(y)], -1)

    z = flow(carry(ode.rate, score), with_zeros(septic(ode).expand(1, 5, 6), 2), u, 96.0, first=0.125)[0, :, 6:] / 96
    assert np.allclose(z[:, 0], [10.78, 4.99, 4.07, 7.75, 8.9], atol=0.02)
    assert np.allclose(1 - z[:, 1], [0, 0.96, 0.63, 0.66, 0.44], atol=0.01)


def test_violation_hidden_between_visits():
    ode = SepsisODE(severity=3.0, tau=48.0).requires_grad_(False)
    over = carry(ode.rate, lambda x, u, t: cost_rate(ode.to_physical(x)).unsqueeze(-1))
    z30 = flow(over, with_zeros(septic(ode), 1), tensor([[0.35, 0.6, 0.3]]), 30.0)
    later = path(over, z30, tensor([[0.35, 0, 0]]), torch.arange(1.0, 67, dtype=F64), t0=30.0, first=0.125)[:, 0, 0]
    lactate = ode.to_physical(later[:, :6])[:, 5]
    ends = ode.to_physical(z30[0, 0, :6])[5], lactate[-1]
    assert np.allclose(ends, [3.56, 2.51], atol=0.01) and abs(lactate.max() - 4.66) < 0.01
    assert later[-1, 6] - z30[0, 0, 6] > 20  # hours above the limit that both visits miss


@settings(max_examples=4, deadline=None)
@given(s=st.floats(0.5, 36), t=st.floats(0.5, 36), seed=st.integers(0, 1000))
def test_no_seam(s, t, seed):
    pair, x, u = bodies(6, seed)
    for ode in pair:
        gap = flow(ode.rate, flow(ode.rate, x, u, s), u, t, s) - flow(ode.rate, x, u, s + t)
        assert gap.abs().max() < 1e-4


def test_rk4_against_the_reference():
    pair, x, u = bodies(20, 1)
    for ode in pair:
        gap = flow(ode.rate, 0.5 * x, u, 12.0) - flow(ode.rate, 0.5 * x, u, 12.0, method="dopri5", rtol=1e-8)
        assert gap.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alone_or_in_company(dtype):
    ode = virtual_patients(7, torch.Generator().manual_seed(3), dtype=dtype).requires_grad_(False)
    alone = SepsisODE(dtype=dtype).requires_grad_(False)
    alone.theta.data = ode.theta.data[4:5]
    gen = torch.Generator().manual_seed(4)
    x, u = torch.randn(7, 3, 6, generator=gen, dtype=dtype), torch.rand(7, 3, 3, generator=gen, dtype=dtype)
    dt = 0.5 + 20 * torch.rand(7, 3, generator=gen, dtype=dtype)
    together = flow(ode.rate, x, u, dt)[4:5, 1:2]
    assert torch.equal(together, flow(alone.rate, x[4:5, 1:2], u[4:5, 1:2], dt[4:5, 1:2]))


def test_path_is_made_of_flows():
    ode = SepsisODE().requires_grad_(False)
    u = torch.rand(3, 1, 1, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    at = torch.tensor([0.0, 3.0, 8.0], dtype=F64)
    states = path(ode.rate, septic(ode), u, at, t0=5.0)
    assert torch.equal(states[0], septic(ode))
    first = flow(ode.rate, septic(ode), u[1], 3.0, 5.0)
    assert torch.equal(states[1], first) and torch.equal(states[2], flow(ode.rate, first, u[2], 5.0, 8.0))


def test_gradients_of_the_physics():
    gen = torch.Generator().manual_seed(0)
    x, u = torch.randn(2, 1, 6, generator=gen, dtype=F64), torch.rand(2, 1, 3, generator=gen, dtype=F64)
    ode = SepsisODE(2).requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x, u: ode.rate(x, u, 3.0), (x.requires_grad_(), u.requires_grad_()))
    k = {name: c.detach() for name, c in MedGymODE(2).coefficients().items()}
    assert torch.autograd.gradcheck(lambda x, u: medgym_rate(x, u, k), (x, u))


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_doses_there_and_back(u):
    u = torch.tensor(u, dtype=F64)
    assert torch.allclose(to_actions(to_doses(u)), u)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_an_impossible_action_is_refused(bad):
    with pytest.raises(ValueError, match="fluid"):
        check_action(torch.tensor([[0.1, 0.2, bad]]))


@pytest.mark.parametrize("dt", [0.0, -1.0, float("nan"), float("inf")])
def test_time_must_move(dt):
    with pytest.raises(ValueError, match="dt must be positive"):
        flow(MedGymODE().rate, torch.zeros(1, 1, 6, dtype=F64), torch.zeros(1, 1, 3, dtype=F64), dt)


def test_divergence_names_its_patient():
    def explode(x, u, t):
        return 1e3 * x**3

    x = torch.zeros(3, 2, 1, dtype=F64)
    x[1, 1] = 1.0
    with pytest.raises(DivergenceError, match=r"\(1, 1\)") as e:
        flow(explode, x, torch.zeros(3, 2, 3, dtype=F64), 2.0)
    assert e.value.where == [(1, 1)]


@pytest.mark.parametrize("values", [dict(severity=-1.0), dict(tau=float("inf")), dict(nonsense=1.0)])
def test_impossible_parameters(values):
    with pytest.raises(ValueError, match="coefficient"):
        SepsisODE(**values)


def test_pressors_add_up():
    dose, habit = np.meshgrid([0, 0.05, 0.1, 0.25, 0.5], np.arange(5))
    r = pressors(dose, habit)
    share = dict(norepinephrine=1, epinephrine=1, phenylephrine=1 / 10, dopamine=1 / 100, vasopressin=2.5 / 60)
    total = sum(r[drug] * weight for drug, weight in share.items())
    assert np.allclose(total, dose) and min(v.min() for v in r.values()) >= 0


# the synthetic cohort


def test_same_seed_same_bytes(tmp_path):
    sums = [(write_cohort(tmp_path / n, n_patients=6, seed=3, hours=24) / "SHA256SUMS").read_text() for n in "ab"]
    assert sums[0] == sums[1]
    with pytest.raises(ValueError, match="not empty"):
        write_cohort(tmp_path / "a")


def test_sample_is_what_was_recorded():
    listed = dict(line.split("  ")[::-1] for line in (SAMPLE / "SHA256SUMS").read_text().splitlines())
    assert {f"{name}.csv.gz" for name in COLUMNS} | {"truth/course.npz", "truth/cohort.json"} == set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((SAMPLE / name).read_bytes()).hexdigest() == digest, name
    assert sum(f.stat().st_size for f in SAMPLE.rglob("*") if f.is_file()) < 5e6
    config = json.loads((SAMPLE / "truth/cohort.json").read_text())["config"]
    assert f"n_patients={config['n_patients']}, seed={config['seed']}" in (SAMPLE / "README.md").read_text()


def test_sample_holds_together():
    def read(name, **kw):
        return pd.read_csv(SAMPLE / f"{name}.csv.gz", **kw)

    stays = read("icu/icustays", parse_dates=["intime", "outtime"])
    people, stay_times = read("hosp/patients"), stays.set_index("stay_id")
    assert people.anchor_age.min() >= 18 and stays.subject_id.nunique() == len(people) < len(stays)
    assert not stays.hadm_id.is_unique  # a second stay of one hospital admission
    for name, start, end in (("input", "starttime", "endtime"), ("chart", "charttime", "charttime")):
        rows = read(f"icu/{name}events", parse_dates=[start, end]).join(stay_times[["intime", "outtime"]], on="stay_id")
        assert (rows[start] >= rows.intime).all() and (rows[end] <= rows.outtime).all()
    labs = read("hosp/labevents", parse_dates=["charttime", "storetime"])
    assert (labs.storetime >= labs.charttime).all() and set(labs.itemid) <= set(read("hosp/d_labitems").itemid)
    items = set(read("icu/d_items").itemid)
    assert all(set(read(f"icu/{n}events").itemid) <= items for n in ("chart", "input", "output", "procedure"))


def test_layout_is_that_of_the_demo():
    root = os.environ.get("MEDSIM_DATA")
    demo = Path(root or "", "mimic-iv-demo")
    if not root or not demo.is_dir():
        pytest.skip("MEDSIM_DATA is unset or holds no mimic-iv-demo/")
    for name, columns in COLUMNS.items():
        real = list(pd.read_csv(demo / f"{name}.csv.gz", nrows=0))
        assert columns == real, name


def test_the_clinician_saw_only_the_record(tmp_path):
    "FiO2 and vasopressor probabilities follow from what the reader says was known before each decision."
    store = extract(SAMPLE, tmp_path / "store", progress=False)
    truth = np.load(SAMPLE / "truth/course.npz")
    events = store.events(["spo2", "map", "lactate"]).sort_values("available_h")
    i, t = np.nonzero(4 * np.arange(truth["level"].shape[1]) < truth["out_h"][:, None])
    decisions = pd.DataFrame(dict(stay_id=truth["stay_id"][i], hour=4.0 * t, i=i, t=t))
    seen = []
    for name, default in SEEN.items():
        rows = events[(events.variable == name)].sort_values(["stay_id", "time_h"])
        last = decisions.merge(rows, on="stay_id", how="left")
        last = last[last.available_h < last.hour - 1e-6].groupby(["i", "t"]).value.last()
        seen.append(last.reindex(pd.MultiIndex.from_frame(decisions[["i", "t"]])).fillna(default).to_numpy())
    oxygen = np.where(t > 0, truth["level"][i, np.maximum(t - 1, 0), 0], 1)
    expected = level_probabilities(targets(np.column_stack(seen), oxygen))[:, :2]
    assert np.allclose(expected, truth["probability"][i, t, :2], atol=1e-4)
