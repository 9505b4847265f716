"The simulator: flows without seams, one patient alone or in company, files, and everything it must refuse."
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from medsim.sim.filtering import PatientFilter
from medsim.sim.hybrid import HybridODE, correction_net
from medsim.sim.noise import ResidualNoise
from medsim.sim.odesolve import carry, flow, path, with_zeros
from medsim.sim.physiology import HIGH, LOW, MedGymODE, SepsisODE, cost_rate
from medsim.sim.pinn import SurrogateConfig, fit_surrogate
from medsim.sim.simulator import ODES, PatientDivergence, Simulator
from medsim.sim.trajectories import Domain

F64 = torch.float64


def doses(k, b=1, seed=0, dtype=F64):
    return torch.rand(k, b, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kinds(k=3):
    gen = torch.Generator().manual_seed(0)
    nets = correction_net((8,)), correction_net((8,), seed=list(range(k))), correction_net((8,), acts=True)
    level = 0.3 * torch.randn(k, 6, generator=gen)
    return {
        "sepsis": Simulator.virtual(k).ode, "medgym": MedGymODE(k, mean=(1.0,) * 6, sd=(2.0,) * 6),
        "pull": HybridODE(SepsisODE(k), level=level),
        "shared": HybridODE(SepsisODE(k, dtype=torch.float32), nets[0], level=level),
        "stacked": HybridODE(MedGymODE(k), nets[1], level=level, bound=0.5),
        "acts": HybridODE(SepsisODE(k), nets[2], level=level, acts=True),
    }  # fmt: skip


def full(k=3, kind="sepsis"):
    ode = kinds(k)[kind].requires_grad_(False)
    config = SurrogateConfig(width=8, trajectories=60, steps=4, batch=30)
    noise = ResidualNoise(*(c * torch.ones(k, 6) for c in (0.1, 0.05, 0.2)))
    return Simulator(ode, ids=[f"p{i}" for i in range(k)], noise=noise, prior=PatientFilter(2), meta={"note": [1, "a"]},
                     surrogate=fit_surrogate(ode, config, domain=Domain(dt_high=4.0), progress=False))


@settings(max_examples=3, deadline=None)
@given(s=st.floats(0.5, 36), t=st.floats(0.5, 36), seed=st.integers(0, 999))
def test_no_seam(s, t, seed):
    for ode in (Simulator.virtual(4, seed).ode, MedGymODE(4).requires_grad_(False)):
        sim = Simulator(ode)
        x, u = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(seed), dtype=F64), doses(4, 2, seed)
        gap = sim.flow(sim.flow(x, u, s), u, t, s) - sim.flow(x, u, s + t)
        assert gap.abs().max() < 1e-4


def test_36_hours():
    x = torch.tensor([[[-1, -1, 0.5, -0.5, -0.5, 1.5]]], dtype=F64)
    end = Simulator(MedGymODE().requires_grad_(False)).flow(x, torch.tensor([[[0.5, 0.5, 0.2]]]), 36.0)[0, 0]
    assert abs(end[1] - 0.427) < 1e-3 and abs(end[5] - 0.460) < 1e-3


@pytest.mark.parametrize("kind", ["sepsis", "medgym", "pull", "stacked", "acts"])
def test_alone_or_in_company(kind):
    sim = Simulator(kinds(5)[kind].requires_grad_(False), ids=list("abcde"))
    x, u = sim.initial(3, torch.Generator().manual_seed(1)), doses(5, 3)
    dt = torch.tensor([0.5, 3.0, 11.0, 1.0, 24.0]).view(5, 1).expand(5, 3)
    all_of_them = sim.flow(x, u, dt)
    alone = sim.select(["d"])
    assert alone.ids == ["d"] and torch.equal(alone.mean0, sim.mean0[3:4])
    mine = alone.flow(x[3:4, :1], u[3:4, :1], dt[3:4, :1])
    if kind in ("stacked", "acts"):  # matrix products of another size may round differently
        assert torch.allclose(mine, all_of_them[3:4, :1], atol=1e-9)
    else:
        assert torch.equal(mine, all_of_them[3:4, :1])


def test_path_is_made_of_flows_and_is_the_solvers():
    sim = Simulator.virtual(2)
    x, u = sim.initial(), torch.stack([doses(2, seed=s) for s in range(3)])
    at = torch.tensor([0.0, 3.0, 8.0])
    states = sim.path(x, u, at, t0=5.0)
    assert torch.equal(states, path(sim.rate, x, u, at.double(), t0=5.0)) and torch.equal(states[0], x)
    assert torch.equal(states[2], sim.flow(states[1], u[2], 5.0, 8.0))
    own = torch.tensor([[1.0], [2.0]]).expand(2, 2, 1) * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    mixed = sim.path(x, u[0], own)
    assert torch.equal(mixed[0], sim.flow(x, u[0], torch.tensor([[1.0], [2.0]])))


def test_violation_between_visits_is_seen():
    sim = Simulator(SepsisODE(severity=3.0, tau=48.0).requires_grad_(False))
    plan = torch.tensor([[[[0.35, 0.6, 0.3]]], [[[0.35, 0, 0]]]], dtype=F64)
    visits = sim.to_physical(sim.path(sim.initial(), plan, torch.tensor([30.0, 96.0])))[:, 0, 0, 5]
    assert torch.allclose(visits, torch.tensor([3.56, 2.51], dtype=F64), atol=0.01)
    over = carry(sim.rate, lambda x, u, t: cost_rate(sim.to_physical(x)).unsqueeze(-1))
    z = flow(over, with_zeros(sim.initial(), 1), plan[0], 30.0)
    assert flow(over, z, plan[1], 66.0, 30.0)[0, 0, 6] - z[0, 0, 6] > 20


@pytest.mark.parametrize("kind", list(kinds()))
def test_round_trip(tmp_path, kind):
    sim = full(kind=kind)
    sim.save(tmp_path / "sim")
    back = Simulator.load(tmp_path / "sim")
    assert back.ids == sim.ids and back.meta == sim.meta and not any(p.requires_grad for p in back.parameters())
    assert {n: v.dtype for n, v in back.state_dict().items()} == {n: v.dtype for n, v in sim.state_dict().items()}
    x, u = sim.initial(2, torch.Generator().manual_seed(0)), doses(3, 2)
    for backend in ("ode", "pinn"):
        how = dict(backend=backend, t0=2.0)
        a, b = (s.flow(x, u, 5.0, generator=torch.Generator().manual_seed(1), **how) for s in (sim, back))
        assert torch.equal(a, b)
    assert torch.equal(back.initial(2, torch.Generator().manual_seed(0)), x)
    back.select(["p2"]).save(tmp_path / "one")
    assert Simulator.load(tmp_path / "one").ids == ["p2"]


def test_noise_only_when_asked():
    sim = full()
    x, u = sim.initial(400), torch.zeros(3, 400, 3, dtype=F64)
    calm = sim.flow(x, u, 4.0)
    assert torch.equal(calm, sim.flow(x, u, 4.0))
    gen = torch.Generator().manual_seed(0)
    rough = sim.flow(x, u, 4.0, generator=gen) - calm
    expected = sim.noise.scale(torch.full((3, 1), 4.0))
    assert torch.allclose(rough.std(1), expected[:, 0].double(), rtol=0.15)
    still = sim.path(x, u, torch.tensor([0.0]), generator=gen)
    assert torch.equal(still[0], x)


def test_virtual_patients():
    a, b, c = Simulator.virtual(200, 1), Simulator.virtual(200, 1), Simulator.virtual(200, 2)
    assert torch.equal(a.ode.theta, b.ode.theta) and torch.equal(a.mean0, b.mean0)
    assert not torch.equal(a.mean0, c.mean0) and a.mean0.dtype == F64
    y = a.to_physical(a.initial(5, torch.Generator().manual_seed(0)))
    assert (y >= torch.tensor(LOW) - 1e-6).all() and (y <= torch.tensor(HIGH) + 1e-6).all()
    middle = y.mean((0, 1))
    assert torch.allclose(middle, torch.tensor([91, 65, 1.6, 11, 600, 4.5], dtype=F64), rtol=0.08)
    with pytest.raises(ValueError, match="at least one"):
        Simulator.virtual(0)


def refuse(says, call):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("dt", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([[1.0], [0.0]])])
def test_time_moves_on(dt):
    sim = Simulator.virtual(2)
    refuse("dt of patient", lambda: sim.flow(sim.initial(), doses(2), dt))


@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), 500.0])
def test_actions_are_never_clipped(bad):
    sim, u = Simulator.virtual(2), doses(2)
    u[1, 0, 2] = bad
    refuse("fluid", lambda: sim.flow(sim.initial(), u, 1.0))
    refuse("fluid", lambda: sim.path(sim.initial(), u, torch.tensor([1.0])))


def test_what_else_is_refused():
    sim = Simulator(Simulator.virtual(2).ode, ids=["a", 7])
    x, u = sim.initial(), doses(2)
    for value in (torch.nan, torch.inf):
        y = x.clone()
        y[1, 0, 3] = value
        refuse("patient 7 is not finite", lambda y=y: sim.flow(y, u, 1.0))
    refuse("shape", lambda: sim.flow(x[0], u, 1.0))
    refuse("shape", lambda: sim.flow(x[..., :5], u, 1.0))
    refuse("floating", lambda: sim.flow(x.long(), u, 1.0))
    refuse("shape", lambda: sim.flow(x, u[:1], 1.0))
    refuse("belong to path", lambda: sim.flow(x, u.expand(4, 2, 1, 3), 1.0))
    refuse("dt has shape", lambda: sim.flow(x, u, torch.ones(3)))
    refuse("t0 of patient", lambda: sim.flow(x, u, 1.0, float("nan")))
    refuse("no surrogate", lambda: sim.flow(x, u, 1.0, backend="pinn"))
    refuse("unknown backend", lambda: sim.flow(x, u, 1.0, backend="euler"))
    refuse("never decrease", lambda: sim.path(x, u, torch.tensor([2.0, 1.0])))
    refuse("never decrease", lambda: sim.path(x, u, torch.tensor([-1.0])))
    refuse("lengths must match", lambda: sim.path(x, u.expand(4, 2, 1, 3), torch.tensor([1.0])))
    refuse("unknown patient 'b'", lambda: sim.select(["a", "b"]))
    refuse("different integers or strings", lambda: Simulator(sim.ode, ids=["a", "a"]))
    refuse("different integers or strings", lambda: Simulator(sim.ode, ids=[1.5, 2]))
    refuse("initial states", lambda: Simulator(sim.ode, initial=(torch.zeros(3, 6), torch.ones(6))))
    refuse("initial states", lambda: Simulator(sim.ode, initial=(torch.zeros(6), -torch.ones(6))))
    refuse("no physiology", lambda: Simulator(torch.nn.Linear(2, 2)))
    refuse("the physiology", lambda: Simulator(sim.ode, surrogate=full().surrogate))


def test_a_diverging_patient_is_named():
    pull = torch.full((3, 6), -3.0)
    pull[1] = 8.0
    sim = Simulator(HybridODE(SepsisODE(3), level=0.0, log_pull=pull).requires_grad_(False), ids=["a", "b", "c"])
    x = torch.ones(3, 2, 6, dtype=F64)
    for call in (lambda: sim.flow(x, 0.5 * x[..., :3], 12.0, 3.0),
                 lambda: sim.path(x, 0.5 * x[..., :3], torch.tensor([1.0, 12.0]), 3.0)):
        with pytest.raises(PatientDivergence, match="patient 'b'.* h since admission") as e:
            call()
        assert e.value.ids == ["b"] and all(place[0] == 1 for place in e.value.where)


def test_noise_cannot_bring_nan():
    class Wild(torch.nn.Module):
        def scale(self, dt): return torch.full((*dt.shape, 6), torch.inf)

        def sample(self, x, dt, generator): return x + self.scale(dt)

    sim = Simulator(Simulator.virtual(2).ode, noise=Wild())
    with pytest.raises(PatientDivergence):
        sim.flow(sim.initial(), doses(2), 1.0, generator=torch.Generator())
    refuse("Wild cannot be saved", lambda: sim.select([0]))


def test_a_wild_surrogate_is_caught():
    sim = full()
    sim.surrogate.rest.bias[-1].data[0] = torch.inf
    with pytest.raises(PatientDivergence):
        sim.flow(sim.initial(), doses(3), 1.0, backend="pinn")


def test_a_taken_folder_is_left_alone(tmp_path):
    (tmp_path / "sim").mkdir()
    (tmp_path / "sim" / "precious").write_text("mine")
    refuse("not empty", lambda: full().save(tmp_path / "sim"))
    assert [f.name for f in tmp_path.rglob("*")] == ["sim", "precious"]


def test_a_failing_save_leaves_nothing(tmp_path):
    sim = Simulator.virtual(1)
    sim.meta["bad"] = {1, 2}
    refuse("JSON", lambda: sim.save(tmp_path / "sim"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "sim"
    full().save(folder)
    return folder


def tampered(saved, tmp_path, change):
    "A copy of the saved folder whose JSON (a dict) or tensors `change` has altered."
    said, tensors = json.loads((saved / "simulator.json").read_text()), load_file(saved / "simulator.safetensors")
    change(said, tensors)
    (tmp_path / "sim").mkdir()
    (tmp_path / "sim" / "simulator.json").write_text(json.dumps(said))
    save_file(tensors, tmp_path / "sim" / "simulator.safetensors")
    return tmp_path / "sim"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda said, tensors: said.update(version=0), "version 0"),
        (lambda said, tensors: said.pop("version"), "version None"),
        (lambda said, tensors: said["ids"].reverse(), "hash"),
        (lambda said, tensors: said["meta"].update(note="x"), "hash"),
        (lambda said, tensors: tensors["ode.theta"].add_(1e-9), "hash"),
        (lambda said, tensors: tensors.pop("mean0"), "hash"),
        (lambda said, tensors: said["ode"].update({"class": "SecretODE"}), "hash"),
    ],
)
def test_changed_files(saved, tmp_path, change, says):
    refuse(says, lambda: Simulator.load(tampered(saved, tmp_path, change)))


def test_an_unknown_physiology(saved, tmp_path, monkeypatch):
    monkeypatch.delitem(ODES, "SepsisODE")
    refuse("unknown here", lambda: Simulator.load(saved))


@pytest.mark.parametrize("name", ["simulator.json", "simulator.safetensors"])
def test_missing_or_broken_files(saved, tmp_path, name):
    folder = tampered(saved, tmp_path, lambda said, tensors: None)
    (folder / name).write_bytes(b"nonsense")
    refuse("not JSON" if "json" in name else "cannot be read", lambda: Simulator.load(folder))
    (folder / name).unlink()
    refuse(f"no {name}", lambda: Simulator.load(folder))
