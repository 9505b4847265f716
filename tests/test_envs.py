"Any Gymnasium agent can treat; one patient and a thousand are treated alike; what happens between visits is counted."

import copy
import gc
import itertools
import math
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

import medsim  # noqa: F401  (registers the ids)
from medsim.core.counter import derive, uniform
from medsim.envs.batch import BatchConfig, TreatmentBatch, check_condition
from medsim.envs.registration import IDS, TABULAR, page, sepsis
from medsim.envs.timing import Timing
from medsim.envs.treatment import TreatmentEnv
from medsim.envs.vector import TreatmentVectorEnv, to_sb3
from medsim.sim.condition import Septic
from medsim.sim.glucose import Glucose
from medsim.sim.noise import ResidualNoise
from medsim.sim.physiology import MedGymODE
from medsim.sim.response import ResponseWarning
from medsim.sim.simulator import Simulator
from medsim.sim.ventilation import Ventilation

torch.set_num_threads(1)
F64 = torch.float64
TIMINGS = ("fixed", "adaptive", "priced")
ALL = sepsis()  # 110 patients with the surrogate of the package
FEW = ALL.select([0, 1, 2])
SHORT = dict(horizon_h=6.0, budget=3, dt_min=0.5, dt_max=3.0)
PINN = dict(SHORT, backend="pinn")


def noisy(condition):
    "The same septic patients with a random part."
    other = Septic(copy.deepcopy(condition.model))
    like = other.model.mean0
    other.model.noise = ResidualNoise(*(torch.full_like(like, v) for v in (0.05, 0.02, 0.1)))
    return other


NOISY = noisy(FEW)


def run(env, actions, **reset):
    "What one episode under `actions` shows: observations, rewards and infos."
    obs, info = env.reset(**reset)
    seen, rewards, infos = [obs], [], [info]
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        seen, rewards, infos = [*seen, obs], [*rewards, reward], [*infos, info]
        if terminated: break
    assert terminated and not truncated
    return np.array(seen), np.array(rewards), infos


def coarse(monkeypatch):
    "A quick solver, where nothing is said of accuracy."
    for name, value in (("first_h", 0.1), ("step_h", 0.25)): monkeypatch.setattr(Ventilation, name, value)


def drawn(space, n, seed=0):
    space.seed(seed)
    return [space.sample() for _ in range(n)]


# ---- Gymnasium's checks


SMALL = {
    "medsim/Sepsis-v0": dict(PINN, n_patients=3),
    "medsim/Glucose-v0": dict(n_patients=3, horizon_h=1.0, budget=3, dt_min=0.25, dt_max=0.5),
    "medsim/Ventilation-v0": dict(n_patients=3, horizon_h=1.0, budget=3, dt_min=0.25, dt_max=0.5),
}
FORMS = list(itertools.product(TIMINGS, (False, True), ("full", "partial")))


@pytest.mark.parametrize("name", IDS)
def test_checker_of_gymnasium(name, monkeypatch):
    coarse(monkeypatch)
    for timing, discrete, observation in FORMS:
        price = dict(price=0.1) if timing == "priced" else {}
        form = dict(timing=timing, discrete=discrete, observation=observation, **price)
        env = gym.make(name, **SMALL[name], **form)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env.unwrapped, skip_render_check=discrete or observation == "partial")
        assert isinstance(env.action_space, gym.spaces.Discrete) == discrete
        n = len(env.unwrapped.condition.treatments) + (timing != "fixed")
        if not discrete: assert env.action_space == gym.spaces.Box(0.0, 1.0, (n,), np.float32)
        s = len(env.unwrapped.condition.states)
        assert env.observation_space.shape == (s * (1 if observation == "full" else 3) + 2,)
        for obs in run(env, drawn(env.action_space, 9), seed=3)[0]: assert env.observation_space.contains(obs)
        env.close()


def test_grids():
    "125 actions for sepsis, times 6 durations if the agent chooses when; 18 settings of a ventilator."
    for name, timing, n in (("Sepsis", "fixed", 125), ("Sepsis", "adaptive", 750), ("Sepsis", "priced", 750),
                            ("Ventilation", "fixed", 18), ("Ventilation", "adaptive", 108)):
        assert gym.make(f"medsim/{name}-v0", n_patients=1, discrete=True, timing=timing).action_space.n == n
    env = gym.make("medsim/Sepsis-v0", n_patients=1, discrete=True, timing="adaptive").unwrapped
    for action in (0, 3, 749):
        env.reset(seed=0)
        hours = env.batch.grid[action, -1].item()
        assert env.step(action)[4]["dt"] == hours


def test_observation_is_state_and_clocks():
    env = TreatmentEnv(FEW, timing="adaptive", path=True, **PINN)
    seen, _, infos = run(env, [[0.5, 0.2, 0.1, 0.0]] * 3, seed=1)
    low, high = (FEW.model.to_normalised(torch.tensor([[[getattr(q, end) for q in FEW.states]]])).reshape(-1).numpy()
                 for end in ("low", "high"))
    for j, (obs, info) in enumerate(zip(seen[1:], infos[1:], strict=True), 1):
        end = FEW.model.to_normalised(torch.tensor(info["path"]["states"][-1])[None, None]).reshape(-1).numpy()
        assert np.allclose(obs[:6], np.clip(end, low, high), atol=1e-5)
        assert np.allclose(obs[6:], [1 - info["hour"] / 6, 1 - j / 3], atol=1e-6)
    assert infos[-1]["hour"] == 6.0 and infos[1]["dt"] == 0.5 and infos[3]["dt"] == pytest.approx(5.0)


# ---- ids


def fresh(code):
    "What another program prints."
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_another_program_finds_the_ids():
    code = """
import sys, gymnasium as gym
env = gym.make("medsim:medsim/Sepsis-v0", n_patients=2)  # medsim is not imported before
obs, _ = env.reset(seed=5)
print(obs.sum(), sum(name.startswith("medsim/") for name in gym.registry), gym.spec("medsim/Glucose-v0").id)
rows = gym.make_vec("medsim/Sepsis-v0", num_envs=4, n_patients=2)
print(type(rows.unwrapped).__name__, rows.reset(seed=5)[0].shape, sep="-")
"""
    total, ids, glucose, rows, *shape = fresh(code)
    again, _ = gym.make("medsim/Sepsis-v0", n_patients=2).reset(seed=5)
    assert int(ids) == len(IDS) + len(TABULAR)
    assert float(total) == pytest.approx(again.sum(), abs=1e-5) and glucose == "medsim/Glucose-v0"
    assert rows.startswith("TreatmentVectorEnv") and "".join([rows, *shape]).endswith("(4,8)")


def test_importing_medsim_loads_no_torch():
    assert fresh("import sys, medsim; print('torch' in sys.modules)") == ["False"]


@pytest.mark.parametrize("name", IDS)
def test_ids_can_be_written_down(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = gym.envs.registration.EnvSpec.from_json(gym.spec(name).to_json())
        assert spec == gym.spec(name) and spec.max_episode_steps is None
        env = gym.make(name, timing="adaptive", **SMALL[name])
        twin = gym.envs.registration.EnvSpec.from_json(env.spec.to_json()).make()
    a, b = (run(e, drawn(env.action_space, 9), seed=2) for e in (env, twin))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


@pytest.mark.parametrize("name", IDS)
def test_make_vec(name, monkeypatch):
    coarse(monkeypatch)
    rows = gym.make_vec(name, num_envs=3, **SMALL[name])
    assert rows.num_envs == 3 and rows.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, info = rows.reset(seed=0)
    assert rows.observation_space.contains(obs) and list(info["patient"]) == [0, 1, 2]
    obs, reward, terminated, truncated, info = rows.step(rows.action_space.sample())
    assert rows.observation_space.contains(obs) and reward.shape == terminated.shape == truncated.shape == (3,)
    apart = gym.make_vec(name, num_envs=2, vectorization_mode="sync", **SMALL[name])
    assert apart.reset(seed=0)[0].shape == (2, *rows.single_observation_space.shape)


def test_patients_of_an_id():
    assert gym.make_vec("medsim/Sepsis-v0", num_envs=5).unwrapped.patient.tolist() == [0, 1, 2, 3, 4]
    rows = gym.make_vec("medsim/Sepsis-v0", num_envs=4, patient=[7, 3]).unwrapped
    assert rows.patient.tolist() == [7, 7, 3, 3]
    with pytest.raises(ValueError, match="num_envs=5 is not a multiple of the 2 patients"):
        gym.make_vec("medsim/Sepsis-v0", num_envs=5, patient=[7, 3])
    for name in IDS:
        assert gym.make(name, patient="population", backend="ode").reset(seed=0)[1]["patient"] == "population"


def test_population_by_default():
    "The id as it is registered also treats the mean patient."
    env = gym.make("medsim/Sepsis-v0", patient="population")
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[4]["dt"] == pytest.approx(9.6)


# ---- the same patient alone and among others


def same(one, rows, row, atol=1e-6):
    "Whether an info of the single form is the row of the vector form's."
    for key, value in one.items():
        if key != "patient": assert np.isclose(value, rows[key][row], rtol=0, atol=atol), key


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31), row=st.integers(0, 5), timing=st.sampled_from(TIMINGS), discrete=st.booleans(),
    observation=st.sampled_from(["full", "partial"]), noise=st.booleans(), ode=st.integers(0, 3),
)
def test_a_row_is_the_single_environment(seed, row, timing, discrete, observation, noise, ode):
    how = dict(SHORT, timing=timing, discrete=discrete, observation=observation, noise=noise)
    how |= dict(backend="pinn") if ode else dict(backend="ode", horizon_h=2.0, dt_max=1.0)
    rows = TreatmentVectorEnv(NOISY, 2, **how)
    single = TreatmentEnv(NOISY, patient=row // 2, **how)
    seen, info = rows.reset(seed=seed)
    obs, own = single.reset(seed=seed + row)
    assert np.array_equal(obs, seen[row]) and own["patient"] == info["patient"][row]
    rows.action_space.seed(seed % 1000)
    ended = 0
    for _ in range(5):
        action = rows.action_space.sample()
        seen, reward, terminated, _, info = rows.step(action)
        obs, own_reward, end, _, own = single.step(action[row])
        assert abs(reward[row] - own_reward) < 1e-6 and terminated[row] == end
        same(own, info, row)
        if end:
            assert np.abs(obs - info["final_obs"][row]).max() < 1e-6 and info["_final_obs"][row]
            obs, ended = single.reset()[0], ended + 1
        assert np.abs(obs - seen[row]).max() < 1e-6
    assert ended or timing == "priced" or how["budget"] > 5


@pytest.mark.parametrize("kind", [Glucose, Ventilation])
def test_other_conditions_are_the_same_alone(kind):
    patients = kind.virtual(2)
    how = dict(horizon_h=1.0, budget=2, observation="partial", discrete=kind is Ventilation)
    rows, single = TreatmentVectorEnv(patients, 2, **how), TreatmentEnv(patients, patient=1, **how)
    seen, obs = rows.reset(seed=8)[0], single.reset(seed=11)[0]
    for action in drawn(rows.action_space, 3):
        assert np.abs(seen[3] - obs).max() < 1e-6
        seen, reward, terminated, _, info = rows.step(action)
        obs, own_reward, end, _, own = single.step(action[3])
        assert abs(reward[3] - own_reward) < 1e-6 and terminated[3] == end
        same(own, info, 3)
        if end: obs = single.reset()[0]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(TIMINGS), st.sampled_from(["full", "partial"]))
def test_same_seed_same_episode_and_then_others(seed, timing, observation):
    env = TreatmentEnv(NOISY, noise=True, timing=timing, observation=observation, **PINN)
    actions = drawn(env.action_space, 20)
    first, again = run(env, actions, seed=seed), run(env, actions, seed=seed)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    second = run(env, actions)
    assert not np.array_equal(first[0], second[0])
    twin = TreatmentEnv(NOISY, noise=True, timing=timing, observation=observation, **PINN)
    twin.reset(seed=seed)  # the second episode does not depend on what was done in the first
    assert np.array_equal(run(twin, actions)[0], second[0])
    assert not np.array_equal(run(env, actions, seed=seed + 1)[0], first[0])


def test_without_a_seed_programs_differ():
    assert not np.array_equal(*(TreatmentEnv(FEW, **PINN).reset()[0] for _ in range(2)))
    assert not np.array_equal(*(TreatmentVectorEnv(FEW, **PINN).reset()[0] for _ in range(2)))


def test_other_rows_do_not_matter():
    how = dict(PINN, noise=True, observation="partial", timing="adaptive")
    many, one = TreatmentVectorEnv(NOISY, 8, **how), TreatmentVectorEnv(NOISY.select([1]), 1, **how)
    seen, own = many.reset(seed=0)[0], one.reset(seed=[13])[0]
    for action in drawn(many.action_space, 7):
        assert np.abs(seen[13] - own[0]).max() < 1e-6
        seen, reward, *_ = many.step(action)
        own, own_reward, *_ = one.step(action[13:14])
        assert abs(reward[13] - own_reward[0]) < 1e-6


def test_seeds_of_rows():
    rows = TreatmentVectorEnv(FEW, 2, **PINN)
    first = rows.reset(seed=4)[0]
    assert np.array_equal(rows.reset(seed=range(4, 10))[0], first) and len(np.unique(first[:, 0])) == 6
    assert np.array_equal(rows.reset(seed=np.int64(4))[0], first)
    later = rows.reset()[0]
    assert not np.array_equal(later, first) and not np.array_equal(rows.reset()[0], later)
    with pytest.raises(ValueError, match="seed: give one integer, or one for each of the 6 rows"):
        rows.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="seed"): rows.reset(seed=[0.5] * 6)


def test_whom():
    env = TreatmentEnv(ALL, **PINN)
    for who in (5, 109, 0): assert env.reset(seed=1, options={"patient": who})[1]["patient"] == who
    assert env.reset(seed=1)[1]["patient"] == env.reset(seed=1, options={})[1]["patient"]
    named = TreatmentEnv(ALL, patient=9, **PINN)
    assert {named.reset()[1]["patient"] for _ in range(5)} == {9}
    a, b = named.reset(seed=3)[0], env.reset(seed=3, options={"patient": 9})[0]
    assert np.array_equal(a, b)  # and so is the chosen one's start
    assert len({env.reset()[1]["patient"] for _ in range(60)}) > 30


@pytest.mark.parametrize("odds", [{0: 0.7, 1: 0.3}, {2: 6, 0: 3, 1: 1}, {1: 1.0, 2: 0.0}])
def test_patients_come_as_often_as_said(odds):
    env, n = TreatmentEnv(FEW, patient=odds, **PINN), 600
    env.reset(seed=0)
    came = [env.reset()[1]["patient"] for _ in range(n)]
    for who, p in odds.items():
        p = p / sum(odds.values())
        assert abs(came.count(who) - n * p) <= 4.5 * math.sqrt(n * p * (1 - p))
    assert len(set(zip(came[:-1], came[1:], strict=True))) == sum(v > 0 for v in odds.values()) ** 2  # all successions


# ---- time may be cut in any way


def along(condition, doses, cuts, horizon, seed=0, gamma=0.997):
    "Rewards, discounted, cost and severity hours (4, K) of `doses` {hour: action} with visits at `cuts` besides."
    visits = sorted({0.0, *doses, *cuts, horizon})
    clock = Timing("priced", horizon, dt_min=1e-3, dt_max=horizon)
    batch = TreatmentBatch(condition, 1, BatchConfig(clock, gamma=gamma))
    batch.reset(torch.tensor(seed).expand(batch.shape))
    sums, discount, name = torch.zeros(4, batch.shape[0], dtype=F64), 1.0, condition.severity_name
    for begin, end in itertools.pairwise(visits):
        u = next(doses[h] for h in sorted(doses, reverse=True) if h <= begin)
        left = horizon - begin
        wish = 1.0 if end == horizon else (end - begin - 1e-3) / (left - 1e-3)
        action = torch.cat([torch.as_tensor(u, dtype=F64), torch.tensor([wish], dtype=F64)])
        step = batch.step(action.expand(*batch.shape, -1))
        i = step.info
        assert (i["dt"] - (end - begin)).abs().max() < 1e-9
        parts = (step.reward, discount * i["discounted_reward"], i["cost"], i[f"{name}_mean"] * i["dt"])
        sums, discount = sums + torch.stack([p[:, 0] for p in parts]), discount * i["discount"]
    assert step.done.all()
    return sums, batch.x


CUT = {"sepsis": (FEW, 10.0, 1e-3), "glucose": (Glucose.virtual(3), 6.0, 1e-3),
       "ventilation": (Ventilation.virtual(3), 3.0, 0.01)}  # 0.03 h: below 1e-3 of its horizon of 48 h


@pytest.mark.parametrize("kind", CUT)
@settings(max_examples=4, deadline=None)
@given(st.data())
def test_sums_do_not_depend_on_the_cut(kind, data):
    """Rewards, discounted and not, and severity agree to 1e-3, and so does the share of the time unsafe.

    The lung turns within minutes: when it crosses a limit is known to a share of a solver's step, 0.03 h at most.
    """
    condition, horizon, moment = CUT[kind]
    m = len(condition.treatments)
    unit = st.floats(0, 1) if kind != "glucose" else st.floats(0, 0.15)
    dose = st.lists(unit, min_size=m, max_size=m)
    inside = st.floats(0.05, horizon - 0.05).map(lambda h: round(h, 3))
    doses = {0.0: data.draw(dose), data.draw(inside): data.draw(dose)}
    cuts = data.draw(st.lists(inside, min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 10**6))
    whole, x = along(condition, doses, [], horizon, seed)
    parts, y = along(condition, doses, cuts, horizon, seed)
    size = whole[[0, 1, 3]].abs().clamp(min=1)
    assert ((whole - parts)[[0, 1, 3]] / size).abs().max() < 1e-3 and (x - y).abs().max() < 1e-3
    assert (whole[2] - parts[2]).abs().max() / horizon < max(1e-3, moment)


def test_budget_is_a_cut_too():
    "Fixed timing with 2 and 6 decisions, the dose held."
    totals = []
    for budget in (2, 6):
        env = TreatmentEnv(FEW, patient=1, horizon_h=12.0, budget=budget)
        seen, rewards, infos = run(env, [np.array([0.5, 0.3, 0.2])] * 6, seed=3)
        infos, earlier = infos[1:], np.cumprod([1.0, *(i["discount"] for i in infos[1:])])[:-1]
        totals.append((rewards.sum(), sum(i["cost"] for i in infos),
                       earlier @ [i["discounted_reward"] for i in infos], *seen[-1][:6]))
    assert np.allclose(*totals, atol=1e-3)


@pytest.mark.parametrize("observation", ["full", "partial"])
def test_one_decision_for_the_whole_horizon(observation):
    "Beyond dt_max, and beyond what the surrogate takes in one piece."
    for timing in ("fixed", "adaptive"):
        env = TreatmentEnv(FEW, timing=timing, budget=1, backend="pinn", observation=observation, path=True)
        _, _, infos = run(env, [np.full(env.action_space.shape, 0.4)], seed=2)
        assert infos[1]["dt"] == infos[1]["hour"] == 96.0
        x = FEW.to_normalised(torch.from_numpy(infos[1]["path"]["states"])[None])[0]
        assert x.isfinite().all() and x[40:].diff(dim=0).abs().max() < 0.05  # the legs fit together


def test_discount_is_per_hour():
    for gamma in (0.9, 0.997, 1.0):
        env = TreatmentEnv(FEW, patient=0, gamma=gamma, reward=lambda y, u: torch.ones_like(y[..., 0]), **PINN)
        env.reset(seed=0)
        _, reward, _, _, info = env.step(env.action_space.sample())
        assert reward == pytest.approx(2.0) and info["discount"] == pytest.approx(gamma**2)
        expected = 2.0 if gamma == 1 else (1 - gamma**2) / -math.log(gamma)
        assert info["discounted_reward"] == pytest.approx(expected, abs=1e-6)


def test_price_is_paid_per_decision():
    free, paid = (TreatmentEnv(FEW, patient=0, timing="priced", price=p, **PINN) for p in (0.0, 2.5))
    actions = drawn(free.action_space, 12)
    a, b = run(free, actions, seed=1), run(paid, actions, seed=1)
    assert np.allclose(a[1] - b[1], 2.5) and np.array_equal(a[0], b[0])
    assert [i["cost"] for i in a[2][1:]] == [i["cost"] for i in b[2][1:]]


# ---- what is told of an interval


KEYS = {"dt", "discount", "discounted_reward", "cost", "unsafe_share", "violated", "hour"}


@pytest.mark.parametrize("backend", ["pinn", "ode"])
def test_info(backend):
    env = TreatmentEnv(FEW, path=True, timing="adaptive", **{**SHORT, "backend": backend})
    hour = 0.0
    for info in run(env, drawn(env.action_space, 9, seed=4), seed=0)[2][1:]:
        assert set(info) == KEYS | {"sofa_start", "sofa_end", "sofa_mean", "worst_lactate", "path"}
        hours, states = info["path"]["hours"], info["path"]["states"]
        assert hours[0] == pytest.approx(hour) and hours[-1] == pytest.approx(info["hour"])
        hour = hour + info["dt"]
        assert hour == pytest.approx(info["hour"]) and info["discount"] == pytest.approx(0.997 ** info["dt"])
        lactate = states[:, 5]
        assert -1e-3 < info["worst_lactate"] - lactate.max() < 0.02
        assert 0 <= info["unsafe_share"] <= 1 + 1e-12
        assert info["cost"] == pytest.approx(info["unsafe_share"] * info["dt"])
        assert info["violated"] == (info["worst_lactate"] > 4)
        share = (lactate > 4).mean()
        assert abs(info["unsafe_share"] - share) < 3 / len(lactate) + 0.02
        assert 0 <= info["sofa_start"] <= 24 and 0 <= info["sofa_end"] <= 24


def test_reward_is_the_severity_and_the_price():
    env = TreatmentEnv(FEW, patient=2, **PINN)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.zeros(3))
    assert reward == pytest.approx(-info["sofa_mean"] * info["dt"]) and reward < info["discounted_reward"] < 0


@pytest.mark.parametrize("kind", [Glucose, Ventilation])
def test_info_of_other_conditions(kind):
    c = kind.virtual(1)
    env = TreatmentEnv(c, horizon_h=1.0, budget=1)
    info = run(env, drawn(env.action_space, 1), seed=0)[2][1]
    severity = {f"{c.severity_name}_{end}" for end in ("start", "end", "mean")}
    assert set(info) == KEYS | severity | {f"worst_{h.name}" for h in c.hazards}


def test_a_violation_that_endpoint_checks_miss():
    "Lactate at both ends under the limit, above it in between: told by cost, share and worst."
    how = dict(horizon_h=36.0, budget=1, backend="pinn")
    rows = TreatmentVectorEnv(ALL, **how)
    u = uniform(derive(torch.tensor(7), torch.arange(rows.num_envs)[:, None], torch.arange(3)))
    rows.reset_torch(0)
    begin = ALL.to_physical(rows.batch.x)[:, 0, 5]
    info = rows.step_torch(u).info
    seen = rows.condition.to_physical(info["final_obs"][:, None, :6].double())[:, 0, 5]  # within what can be charted
    edge = torch.maximum(begin, seen)
    i = int((info["worst_lactate"] - edge).argmax())
    limit = float((info["worst_lactate"][i] + edge[i]) / 2)
    env = TreatmentEnv(ALL, patient=i, path=True, cost=lambda y, u: y[..., 5] - limit, **how)
    info = run(env, [u[i].numpy()], seed=i)[2][1]
    lactate = info["path"]["states"][:, 5]
    assert max(lactate[0], lactate[-1]) < limit - 0.02 < limit + 0.02 < lactate.max()
    assert info["violated"] and info["cost"] > 0 and 0 < info["unsafe_share"] < 1
    assert info["worst_cost"] == pytest.approx(lactate.max() - limit, abs=0.02)


def test_own_reward_and_cost():
    env = TreatmentEnv(FEW, patient=0, reward=lambda y, u: -((u - 0.5) ** 2).sum(-1), cost=lambda y, u: u[..., 1] - 0.4,
                       **PINN)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array([0.5, 0.5, 1.0]))
    assert reward == pytest.approx(-0.25 * 2) and info["cost"] == pytest.approx(2.0) and info["violated"]
    assert info["worst_cost"] == pytest.approx(0.1) and "worst_lactate" not in info
    _, reward, _, _, info = env.step(np.array([0.5, 0.3, 0.5]))
    assert reward == pytest.approx(-0.04 * 2) and info["cost"] == 0 and not info["violated"]


# ---- pictures


@pytest.mark.parametrize("name", IDS)
def test_render(name, monkeypatch):
    coarse(monkeypatch)
    quiet, drawing = gym.make(name, **SMALL[name]), gym.make(name, render_mode="rgb_array", **SMALL[name])
    a, b = quiet.reset(seed=3)[0], drawing.reset(seed=3)[0]
    pictures = []
    for action in drawn(quiet.action_space, 3):
        pictures.append(drawing.render())
        assert np.array_equal(a, b)
        (a, *rest), (b, *others) = quiet.step(action), drawing.step(action)
        assert rest == others
    last = drawing.render()
    assert last.dtype == np.uint8 and last.ndim == 3 and last.shape[2] == 3 and min(last.shape[:2]) > 100
    assert last.std() > 5 and not np.array_equal(last, pictures[-1])
    assert quiet.unwrapped.render() is None


def test_render_of_partial_and_hidden():
    env = TreatmentEnv(Glucose.virtual(1), horizon_h=2.0, budget=2, observation="partial", render_mode="rgb_array")
    run(env, drawn(env.action_space, 2), seed=0)
    assert env.render().shape[2] == 3


# ---- the vector form


def test_autoreset_in_the_same_step():
    rows = TreatmentVectorEnv(FEW, 2, **PINN)
    rows.reset(seed=0)
    for j in range(1, 7):
        obs, _, terminated, truncated, info = rows.step(rows.action_space.sample())
        assert terminated.all() == (j % 3 == 0) and not truncated.any()
        assert ("final_obs" in info) == terminated.any()
        if terminated.any():
            assert np.allclose(info["final_obs"][:, 6:], 0) and np.allclose(obs[:, 6:], 1)
            assert info["_final_obs"].all()
        assert all(len(v) == 6 for v in info.values())


def test_rows_end_each_at_their_own_time():
    rows = TreatmentVectorEnv(FEW, 2, timing="priced", **PINN)
    rows.reset(seed=0)
    action, ends = np.full((6, 4), 0.3), np.zeros(6, int)
    action[:, 3] = np.linspace(0, 1, 6)
    for _ in range(15):
        obs, _, terminated, _, info = rows.step(action)
        if terminated.any():
            assert np.array_equal(info["_final_obs"], terminated)
            assert np.allclose(info["final_obs"][terminated, 6], 0)
        assert np.array_equal(obs[:, 6] == 1, terminated)
        ends += terminated
    assert ends.min() >= 1 and len(set(ends)) > 3


def test_torch_and_numpy_agree_without_copies():
    a, b = (TreatmentVectorEnv(FEW, 2, observation="partial", **PINN) for _ in range(2))
    assert np.array_equal(a.reset(seed=1)[0], b.reset_torch(1).numpy())
    for action in drawn(a.action_space, 4):
        obs, reward, done, _, info = a.step(action)
        step = b.step_torch(torch.from_numpy(action))
        assert np.array_equal(obs, step.obs.numpy()) and np.array_equal(reward, step.reward.numpy())
        assert np.array_equal(done, step.done.numpy()) and set(step.info) == {k for k in info if k[0] != "_"}
        assert step.obs.dtype == torch.float32 and not step.obs.requires_grad


def test_earlier_observations_are_not_overwritten():
    rows = TreatmentVectorEnv(FEW, 2, observation="partial", **PINN)
    first = rows.reset(seed=1)[0]
    kept = first.copy()
    for action in drawn(rows.action_space, 4): rows.step(action)
    assert np.array_equal(first, kept)


def test_statistics_wrapper():
    rows = gym.wrappers.vector.RecordEpisodeStatistics(TreatmentVectorEnv(FEW, 2, **PINN))
    rows.reset(seed=0)
    total = np.zeros(6)
    for action in drawn(rows.action_space, 3):
        _, reward, _, _, info = rows.step(action)
        total += reward
    assert np.allclose(info["episode"]["r"], total) and (info["episode"]["l"] == 3).all()


def resident():
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * 4096


def held():
    "Bytes of all tensors that are alive."
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if issubclass(type(o), torch.Tensor))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("observation, steps", [("full", 300), ("partial", 90)])
def test_memory_does_not_grow(observation, steps):
    rows = TreatmentVectorEnv(NOISY, 16, timing="adaptive", observation=observation, noise=True, **PINN)
    rows.reset(seed=0)
    actions = drawn(rows.action_space, 6)

    def go(n):
        for j in range(n): rows.step(actions[j % 6])
        return held(), resident()

    (tensors, before), (later, after) = go(30), go(steps)
    assert abs(later - tensors) < 1e5 and after - before < 20e6


# ---- bad input


def test_bad_settings_are_named():
    for bad, words in [
        (dict(budget=0), "budget=0"), (dict(budget=-3), "budget=-3"), (dict(budget=2.5), "budget=2.5"),
        (dict(dt_min=5.0, dt_max=2.0), "dt_min=5.0, dt_max=2.0"), (dict(dt_min=0.0), "dt_min=0.0"),
        (dict(dt_max=math.nan), "dt_max=nan"), (dict(horizon_h=-1.0), "horizon_h=-1"),
        (dict(timing="daily"), "timing='daily'"), (dict(price=1.0), "price=1.0"),
        (dict(timing="priced", price=-1.0), "price=-1.0"), (dict(timing="priced", dt_min=9.0, dt_max=10.0), "dt_min=9"),
        (dict(backend="rk4"), "backend='rk4'"), (dict(observation="some"), "observation='some'"),
        (dict(gamma=1.5), "gamma=1.5"), (dict(gamma=0), "gamma=0"), (dict(render_mode="human"), "render_mode='human'"),
        (dict(reward=3.0), "reward must be a function"), (dict(cost="lactate"), "cost must be a function"),
        (dict(noise=True), "noise=True, but these patients have no noise model"),
        (dict(timing="adaptive", discrete=True, dt_min=0.1, dt_max=0.3), "durations"),
        (dict(patient=110), "110"), (dict(patient="me"), "me"), (dict(patient=[0, "me"]), "me"),
        (dict(patient={0: 0.5, 999: 0.5}), "999"), (dict(patient={0: -1.0}), "patient"), (dict(patient=[]), "patient"),
        (dict(patient={0: 0.0}), "patient"), (dict(patient={0: math.nan}), "patient"),
    ]:
        with pytest.raises(ValueError, match=words): TreatmentEnv(ALL, **{**dict(horizon_h=6.0), **bad})
    for make in (lambda **k: TreatmentEnv(FEW, **k), lambda **k: TreatmentVectorEnv(FEW, **k),
                 lambda **k: gym.make("medsim/Sepsis-v0", **k), lambda **k: gym.make_vec("medsim/Sepsis-v0", 2, **k)):
        with pytest.raises(TypeError, match="horizont"): make(horizont=3.0)
    with pytest.raises(ValueError, match="probabilities are for single"):
        TreatmentVectorEnv(FEW, patient={0: 0.3, 1: 0.7})
    with pytest.raises(ValueError, match="copies=0"): TreatmentVectorEnv(FEW, 0)
    with pytest.raises(ValueError, match="population"): Septic(MedGymODE()).population()


def test_no_surrogate_is_said_at_once():
    "Not in the first step, when a training run has been set up; nor in the last, where the horizon is too long for it."
    for form in (TreatmentEnv, TreatmentVectorEnv):
        with pytest.raises(ValueError, match="168 h"): form(FEW, backend="pinn", horizon_h=300.0)
        with pytest.raises(ValueError, match="no surrogate"): form(Simulator.virtual(2), **PINN)
        with pytest.raises(ValueError, match="no surrogate"): form(Glucose.virtual(2), backend="pinn")


def test_bad_actions_are_named():
    env, rows = TreatmentEnv(FEW, **PINN), TreatmentVectorEnv(FEW, 2, **PINN)
    grid, grids = TreatmentEnv(FEW, discrete=True, **PINN), TreatmentVectorEnv(FEW, 2, discrete=True, **PINN)
    for e in (env, rows, grid, grids):
        with pytest.raises(ResetNeeded, match="reset"): e.step(e.action_space.sample())
        e.reset(seed=0)
    wrong = [(np.zeros(4), "shape"), (np.zeros((1, 3)), "shape"), (0.5, "shape")]
    wrong += [(np.array([0.1, v, 0.1]), r"\[0, 1\]") for v in (np.nan, 1.01, -1e-6, np.inf)]
    before = env.batch.x.clone(), rows.batch.x.clone()
    for action, words in wrong:
        with pytest.raises(ValueError, match=words): env.step(action)
        with pytest.raises(ValueError, match=words): rows.step(np.stack([np.asarray(action, dtype=float)] * 6))
    with pytest.raises(ValueError, match=r"shape \(6, 3\), got \(5, 3\)"): rows.step(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="5 rows, but there are 6"): rows.step_torch(torch.zeros(5, 3))
    for action, words in [(125, "0 to 124"), (-1, "0 to 124"), (1.0, "integers"), (np.zeros(3, int), "shape")]:
        with pytest.raises(ValueError, match=words): grid.step(action)
        with pytest.raises(ValueError, match=words): grids.step(np.stack([np.asarray(action)] * 6))
    assert torch.equal(env.batch.x, before[0]) and torch.equal(rows.batch.x, before[1])  # nothing has happened
    for _ in range(3): env.step(env.action_space.sample())
    with pytest.raises(ResetNeeded, match="over"): env.step(env.action_space.sample())


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_integers_of_any_size(dtype):
    for env, shape in ((TreatmentEnv(FEW, discrete=True, **PINN), ()),
                       (TreatmentVectorEnv(FEW, discrete=True, **PINN), (3,))):
        env.reset(seed=0)
        if dtype is np.bool_:
            with pytest.raises(ValueError, match="integers"): env.step(np.ones(shape, dtype))
        else: env.step(np.full(shape, 3, dtype))


def test_unknown_patient_at_reset():
    env = TreatmentEnv(FEW, **PINN)
    with pytest.raises(ValueError, match="77"): env.reset(seed=0, options={"patient": 77})


def test_a_refused_reset_is_not_counted():
    env, twin = TreatmentEnv(FEW, **PINN), TreatmentEnv(FEW, **PINN)
    for e in (env, twin): e.reset(seed=0)
    with pytest.raises(ValueError, match="77"): env.reset(options={"patient": 77})
    assert np.array_equal(env.reset()[0], twin.reset()[0])


@pytest.mark.parametrize("rule", [lambda y, u: y[..., :1], lambda y, u: 1.0, lambda y, u: y.sum()])
def test_rules_of_a_wrong_shape_are_named(rule):
    for which in ("reward", "cost"):
        with pytest.raises(ValueError, match=which):
            env = TreatmentEnv(FEW, **{which: rule}, **PINN)
            env.reset(seed=0)
            env.step(env.action_space.sample())


def test_flagged_simulators_warn():
    sim = Simulator.virtual(2)
    row = dict(state="lactate", action="vasopressor", low=0.1, high=0.2, change=0.5, unit="mmol/L", horizon_h=4.0)
    sim.meta["contradictions"] = [row]
    for form in (TreatmentEnv, TreatmentVectorEnv):
        with pytest.warns(ResponseWarning, match="vasopressor 0.1 to 0.2.*raises lactate"): form(Septic(sim))
    with pytest.warns(ResponseWarning, match="contradict"):
        TreatmentEnv(Simulator(MedGymODE().double()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TreatmentEnv(FEW, **PINN)
        TreatmentVectorEnv(FEW, **PINN)


# ---- agents


class Gaussian:
    "A policy of independent normal doses round tanh-squashed means, and its plain policy gradient."

    def __init__(self, d, m, seed=0):
        self.net = torch.nn.Sequential(torch.nn.Linear(d, 32), torch.nn.Tanh(), torch.nn.Linear(32, m))
        gen = torch.Generator().manual_seed(seed)
        for p in self.net.parameters(): torch.nn.init.normal_(p, 0, 0.1, generator=gen)
        self.value = torch.nn.Linear(d, 1)
        self.optimiser = torch.optim.Adam([*self.net.parameters(), *self.value.parameters()], lr=0.02)

    def normal(self, obs): return torch.distributions.Normal(torch.sigmoid(self.net(obs)), 0.1)


def learn(envs, updates=40, steps=8, gamma=0.9, clip=0.2):
    "PPO in the manner of CleanRL, with the numpy interface alone: mean reward of a step in each update."
    torch.manual_seed(0)
    agent = Gaussian(envs.single_observation_space.shape[0], envs.single_action_space.shape[0])
    obs, _ = envs.reset(seed=1)
    history = []
    for _ in range(updates):
        kept = {k: [] for k in ("obs", "action", "logp", "reward", "value", "next_value", "done")}
        for _ in range(steps):
            with torch.no_grad():
                seen = torch.as_tensor(obs)
                action = agent.normal(seen).sample()
                logp = agent.normal(seen).log_prob(action).sum(-1)
            nxt, reward, terminated, truncated, info = envs.step(action.clamp(0, 1).numpy())
            real = nxt.copy()
            done = terminated | truncated
            if done.any(): real[done] = info["final_obs"][done]
            with torch.no_grad():
                values = [agent.value(torch.as_tensor(v)).squeeze(-1) for v in (obs, real)]
            row = (seen, action, logp, torch.as_tensor(reward).float(), *values, torch.as_tensor(terminated).float())
            for k, v in zip(kept, row, strict=True): kept[k].append(v)
            obs = nxt
        b = {k: torch.stack(v) for k, v in kept.items()}
        advantage, run_on = torch.zeros_like(b["reward"]), 0.0
        for t in reversed(range(steps)):
            delta = b["reward"][t] + gamma * b["next_value"][t] * (1 - b["done"][t]) - b["value"][t]
            advantage[t] = run_on = delta + gamma * 0.95 * (1 - b["done"][t]) * run_on
        target, scaled = advantage + b["value"], (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for _ in range(4):
            ratio = (agent.normal(b["obs"]).log_prob(b["action"]).sum(-1) - b["logp"]).exp()
            gain = torch.minimum(ratio * scaled, ratio.clamp(1 - clip, 1 + clip) * scaled).mean()
            loss = 0.5 * (agent.value(b["obs"]).squeeze(-1) - target).square().mean() - gain
            agent.optimiser.zero_grad()
            loss.backward()
            agent.optimiser.step()
        history.append(b["reward"].mean().item())
    return history


def test_a_cleanrl_style_loop_learns():
    "Doses of 0.8, 0.2 and 0.6 are best, whatever the patient's state."
    best = torch.tensor([0.8, 0.2, 0.6], dtype=F64)
    envs = TreatmentVectorEnv(FEW, 16, reward=lambda y, u: -(u - best).square().sum(-1), **PINN)
    history = learn(envs)
    first, last = np.mean(history[:3]), np.mean(history[-3:])
    floor = -3 * 0.1**2 * 2  # of the exploration
    assert first < -0.3 and last - floor > 0.35 * (first - floor)


@pytest.mark.parametrize("name", IDS)
def test_checker_of_stable_baselines3(name, monkeypatch):
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    coarse(monkeypatch)
    forms = FORMS if name == "medsim/Sepsis-v0" else [f for f in FORMS if f[1] == (f[2] == "partial")]
    for timing, discrete, observation in forms:
        env = gym.make(name, timing=timing, discrete=discrete, observation=observation, **SMALL[name])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*symmetric and normalized Box action space.*")
            checker.check_env(env.unwrapped)


def test_ppo_of_stable_baselines3():
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_util import make_vec_env

    how = dict(n_steps=8, batch_size=16, n_epochs=1, device="cpu", seed=0)
    for name, kw in (("medsim/Sepsis-v0", {}), ("medsim/Sepsis-v0", dict(discrete=True, timing="adaptive"))):
        envs = make_vec_env(name, n_envs=2, seed=0, env_kwargs=dict(n_patients=2, **kw))
        agent = sb3.PPO("MlpPolicy", envs, **how).learn(64)
        assert agent.num_timesteps == 64 and len(agent.ep_info_buffer) >= 2
    rows = to_sb3(TreatmentVectorEnv(FEW, 4, discrete=True, observation="partial", **PINN))
    assert sb3.PPO("MlpPolicy", rows, **how).learn(256).num_timesteps >= 256


def test_rows_as_stable_baselines3_sees_them():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

    env = TreatmentVectorEnv(FEW, 2, **PINN)
    rows, twin = to_sb3(env), TreatmentVectorEnv(FEW, 2, **PINN)
    assert rows.seed(5) == [5, 6, 7, 8, 9, 10] and np.array_equal(rows.reset(), twin.reset(seed=5)[0])
    for action in drawn(twin.action_space, 3):
        obs, reward, done, infos = rows.step(action)
        other = twin.step(action)
        assert np.array_equal(obs, other[0]) and np.allclose(reward, other[1]) and np.array_equal(done, other[2])
    assert done.all() and [len(i["terminal_observation"]) for i in infos] == [8] * 6
    assert infos[2]["cost"] == other[4]["cost"][2] and not infos[0]["TimeLimit.truncated"]
    assert rows.env_is_wrapped(object) == [False] * 6 and len(rows.get_attr("spec", [0, 1])) == 2

    class Half:
        def predict(self, obs, state=None, episode_start=None, deterministic=True):
            return np.full((len(obs), 3), 0.5, np.float32), state

    mean, sd = evaluate_policy(Half(), VecMonitor(rows), n_eval_episodes=12)
    assert mean < 0 and sd > 0
    assert VecNormalize(rows).reset().shape == (6, 8)
    rows.close()


# ---- what helps an author


@pytest.mark.parametrize("name", IDS)
def test_pages_say_units_and_bounds(name):
    text = page(name)
    condition = gym.make(name).unwrapped.condition
    for heading in ("Observation space", "Action space", "Rewards", "Starting state", "Episode end", "Arguments"):
        assert f"## {heading}" in text
    for s in condition.states: assert f"| {s.name} | {s.unit} | {s.low:g} | {s.high:g} |" in text
    for t in condition.treatments: assert f"| {t.name} | {t.unit} | {t.low:g} | {t.high:g} |" in text
    with pytest.raises(ValueError, match="unknown environment 'medsim/Gout-v0'"): page("medsim/Gout-v0")


def test_a_condition_is_checked():
    for good in (FEW, Glucose.virtual(2), Ventilation.virtual(2)): check_condition(good)

    class Forgetful(Glucose):
        def measures(self, y, u): return y[..., :2]

    with pytest.raises(ValueError, match=r"glucose: measures has shape \(2, 2, 2\), not \(2, 2, 1\)"):
        check_condition(Forgetful.virtual(2))
    hasty = Ventilation.virtual(2)
    hasty.step_h = hasty.first_h = 1.0
    with pytest.raises(ValueError, match="steps of 1 h are too long"): check_condition(hasty)


@pytest.mark.parametrize("left", [96.0, 30.0, 3.0])
def test_a_wish_is_hours(left):
    clock, n = Timing("adaptive"), torch.tensor(5)
    for hours in (0.5, 2.0, 17.0, 36.0):
        dt = clock.hours(torch.tensor(clock.wish(hours, left), dtype=F64), torch.tensor(left, dtype=F64), n)
        assert dt.item() == pytest.approx(min(hours, left))


def test_a_diverging_patient_is_named():
    env = TreatmentVectorEnv(Septic(Simulator.virtual(3, seed=0)), **SHORT)
    env.condition.model.ode.theta.data[1, 0] = math.nan
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"patient 1: 1 trajectories diverged.*between 0\.00 and 2\.00 h"):
        env.step(np.full((3, 3), 0.3, np.float32))
