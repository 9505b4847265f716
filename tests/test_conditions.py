"A diabetic's day and a ventilated lung: by hand, under any treatment, alone as among others, however time is cut."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.core.counter import derive, uniform
from medsim.sim.glucose import (
    Glucose,
    basal_action,
    basal_rate,
    meal_plan,
    next_meal,
    per_hour,
    proportional,
    risk,
    time_shares,
)
from medsim.sim.odesolve import dopri5, flow, rk4
from medsim.sim.outcome import outcome
from medsim.sim.physiology import saturation
from medsim.sim.textbook import Parameter, drawn, parameter_table
from medsim.sim.ventilation import Ventilation, oxygen_content, oxygen_pressure

F64 = torch.float64
BOTH = (Glucose, Ventilation)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def numbers(seed, *shape):
    return uniform(derive(torch.tensor(seed), torch.arange(math.prod(shape)))).reshape(shape)


def patients(kind, k=4, b=1, seed=0, **options):
    "Some patients, their starts and an action each."
    c = kind.virtual(k, seed, **options)
    return c, c.start(numbers(seed, k, b, c.draws)), numbers(seed + 1, k, b, len(c.treatments))


def steps(c):
    return dict(step=c.step_h, first=c.first_h)


def sd(c, n):
    return torch.tensor(c.scaling, dtype=F64)[:n, 1]


def ventilator_settings():
    ways = [[(v - t.low) / (t.high - t.low) for v in t.levels] for t in Ventilation.treatments]
    return torch.tensor(list(itertools.product(*ways)), dtype=F64)


# ---- tables of constants


def test_patients_differ_by_what_is_said_and_are_cut():
    one = dict(a=Parameter(2.0, 0.2, 0.1, 9.0, "h"), b=Parameter(0.0, 0.2, 0.0, 1.0, ""))
    many = drawn(one, 20000, torch.Generator().manual_seed(0))
    assert abs(many["a"].log().std() - 0.2) < 0.005 and abs(many["a"].median() - 2) < 0.01
    assert many["a"].max() <= 2 * math.exp(0.6) * (1 + 1e-12) and (many["b"] == 0).all()


@pytest.mark.parametrize("kind", BOTH)
def test_bad_constants_are_named(kind):
    name = list(kind.parameters)[1]
    with pytest.raises(ValueError, match="at least one"):
        kind.virtual(0)
    with pytest.raises(ValueError, match="at least one"):
        kind(0)
    with pytest.raises(ValueError, match=rf"{name} of patient \[1\]"):
        kind(3, **{name: torch.tensor([kind.parameters[name].typical, math.nan, kind.parameters[name].typical])})
    with pytest.raises(ValueError, match="nonsense"):
        kind(1, nonsense=1.0)
    with pytest.raises(ValueError, match=f"{name} must be a number or one for each of 3"):
        parameter_table(kind.parameters, 3, {name: torch.ones(2)})
    with pytest.raises(ValueError, match="unknown patient"):
        kind(2).select([2])
    with pytest.raises(ValueError, match="2 different"):
        kind(2, ids=["a", "a"])


@pytest.mark.parametrize("kind", BOTH)
def test_virtual_patients_are_in_range_and_repeatable(kind):
    crowd = kind.virtual(2000, seed=3)
    assert torch.equal(crowd.table, kind.virtual(2000, seed=3).table) and len(crowd.ids) == 2000
    assert not torch.equal(crowd.table, kind.virtual(2000, seed=4).table)
    assert crowd.population().ids == ["population"] and len(crowd.population().table) == 1


# ---- what holds for both


@pytest.mark.parametrize("kind", BOTH)
def test_a_selected_patient_is_the_row_of_the_whole(kind):
    c, x, u = patients(kind, 5, 2)
    whole, few = outcome(c, x, u, 3.0, 1.5, **steps(c)), [3, 1]
    part = outcome(c.select(few), x[few], u[few], 3.0, 1.5, **steps(c))
    assert c.select(few).ids == few  # vectorised powers differ in the last bit with the place in the batch
    assert all(torch.allclose(a[few], b, rtol=1e-10, atol=1e-10) for a, b in zip(whole, part, strict=True))
    given = numbers(7, 5, 3, c.draws)
    assert torch.equal(c.select(few).start(given[few]), c.start(given)[few])


@pytest.mark.parametrize("kind", BOTH)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), begin=st.floats(0, 16), length=st.floats(0.25, 4), cut=st.floats(0.05, 0.95))
def test_the_flow_in_two_pieces_is_the_flow(kind, seed, begin, length, cut):
    c, x, u = patients(kind, 3, 1, seed)
    whole = flow(c.rate, x, u, length, begin, **steps(c))
    half = flow(c.rate, x, u, cut * length, begin, **steps(c))
    rest = flow(c.rate, half, u, (1 - cut) * length, begin + cut * length, **steps(c))
    assert (rest - whole).abs().max() < 1e-4


@pytest.mark.parametrize("kind", BOTH)
def test_default_steps_are_near_the_reference(kind):
    c, x, u = patients(kind, 10, 1, 5)
    u = 0.3 * u if kind is Glucose else u
    x = outcome(c, x, u.flip(0), 1.0, **steps(c)).x
    begin, length = 1 + 17 * numbers(8, 10, 1), 0.25 + 3.75 * numbers(9, 10, 1)
    exact = dopri5(c.rate, x, u, length, begin, rtol=1e-10, atol=1e-10)
    assert (rk4(c.rate, x, u, length, begin, c.step_h, c.first_h) - exact).abs().max() < 2e-4


@pytest.mark.parametrize("kind", BOTH)
def test_sums_do_not_depend_on_how_time_is_cut(kind):
    c, x, u = patients(kind, 6, 1, 2)
    u, hours = (basal_action(c) + 0.2 * u, 24.0) if kind is Glucose else (u, 6.0)
    whole, state = outcome(c, x, u, hours, **steps(c)), x
    sums = torch.zeros(3, 6, 1, dtype=F64)
    cuts = [0.0, *sorted((hours * numbers(4, 6)).tolist()), hours]
    for a, b in itertools.pairwise(cuts):
        part = outcome(c, state, u, b - a, a, **steps(c))
        state, sums = part.x, sums + torch.stack([part.reward, part.severity, part.cost])
    assert (state - whole.x).abs().max() < 1e-4
    assert ((sums[:2] - torch.stack([whole.reward, whole.severity])) / sums[1].clamp(min=1)).abs().max() < 1e-3
    assert (sums[2] - whole.cost).abs().max() < 0.05


@pytest.mark.parametrize("kind", BOTH)
def test_no_treatment_breaks_the_patient(kind):
    "Every extreme throughout, and doses at random, for a whole episode."
    c, m = kind.virtual(40, seed=11), len(kind.treatments)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=m)), dtype=F64).expand(40, -1, m)
    x = c.start(numbers(1, 40, 2**m + 1, c.draws))
    low, high = (torch.tensor([getattr(q, side) for q in c.states]) for side in ("low", "high"))
    if kind is Glucose: low[0] = 0.0  # overdosed, glucose falls below what is charted, never below zero
    for begin in range(0, int(c.horizon_h), 4):
        u = torch.cat([corners, numbers(begin, 40, 1, m)], 1)
        got = outcome(c, x, u, 4.0, float(begin), **steps(c))
        x, y = got.x, c.to_physical(got.x)[..., : len(c.states)]
        assert all(torch.isfinite(v).all() for v in got) and (y > low - 1e-9).all() and (y < high).all()


@pytest.mark.parametrize("kind", BOTH)
def test_float32_agrees_and_stays_float32(kind):
    c, x, u = patients(kind, 4, 2)
    single = kind.virtual(4, dtype=torch.float32)
    for other in (single, c):  # also a float64 condition follows the dtype of the state
        got = outcome(other, x.float(), u.float(), 3.0, **steps(c))
        assert got.x.dtype == got.reward.dtype == got.worst.dtype == torch.float32
        assert (got.x - outcome(c, x, u, 3.0, **steps(c)).x).abs().max() < 2e-3
    assert single.start(numbers(0, 4, 1, c.draws)).dtype == torch.float32
    assert outcome(c.to("cpu"), x, u, 1.0, **steps(c)).x.dtype == F64


@pytest.mark.parametrize("kind", BOTH)
def test_gradient_of_the_rate(kind):
    c, x, u = patients(kind, 2, 1, 1)
    x = outcome(c, x, u, 2.1, **steps(c)).x
    t = torch.full((2, 1), 2.13, dtype=F64)
    with torch.enable_grad():
        x, u = x.requires_grad_(), u.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, u: c.rate(x, u, t), (x, u), atol=1e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_units_there_and_back(kind):
    for c in (kind.virtual(3), *([Glucose.virtual(3, announced=True)] if kind is Glucose else [])):
        x = c.start(numbers(2, 3, 2, c.draws))
        assert torch.allclose(c.to_normalised(c.to_physical(x)), x, atol=1e-14)
        seen = c.visible(x, torch.full((3, 2), 3.0, dtype=F64))
        assert seen.shape == (3, 2, len(c.states))
        assert torch.allclose(c.to_normalised(c.to_physical(seen)), seen, atol=1e-14)
        assert torch.equal(c.to_physical(seen)[..., 0], c.to_physical(x)[..., 0])


@pytest.mark.parametrize("kind", BOTH)
def test_a_hazard_is_positive_in_danger_alone(kind):
    c = kind(1)
    u = torch.full((1, 1, len(c.treatments)), 0.5, dtype=F64)
    well = [100.0, 0, 15] + [0.0] * 8 if kind is Glucose else [90.0, 40, 0.9, 75, 24]
    ill = [65.0, 0, 15] + [0.0] * 8 if kind is Glucose else [45.0, 75, 0.0, 55, 14]
    margins = [c.margins(torch.tensor([[y]], dtype=F64), u)[0, 0] for y in (well, ill)]
    assert (margins[0] < 0).all() and (margins[1] > 0).all() and len(margins[0]) == len(c.hazards)


# ---- glucose


def test_the_basal_rate_in_closed_form():
    k = per_hour({n: torch.tensor(p.typical, dtype=F64) for n, p in Glucose.parameters.items()})
    assert basal_rate(k) * 1000 / 60 == pytest.approx(0.0926 * 15 * 12) == pytest.approx(16.668)


@settings(max_examples=20, deadline=None)
@given(glucose=st.floats(20, 600), seed=st.integers(0, 1000), kidneys=st.booleans())
def test_the_basal_rate_holds_any_glucose(glucose, seed, kidneys):
    c = Glucose.virtual(3, seed, **({} if kidneys else dict(renal=0.0)))
    y = torch.zeros(3, 1, 11, dtype=F64)
    y[..., 0], y[..., 2] = glucose, c.coefficients(y)["i_b"]
    rate = c.rate(c.to_normalised(y), basal_action(c), torch.full((3, 1), 30.0, dtype=F64)) * sd(c, 11)
    lost = c.coefficients(y)["renal"] * 60 * max(glucose - 162, 0)
    assert torch.allclose(rate[..., 0], -lost, atol=1e-10) and rate[..., 1:].abs().max() < 1e-9


@settings(max_examples=50, deadline=None)
@given(g=st.floats(-1, 5000))
def test_the_reward_is_never_positive(g):
    y, c = torch.tensor([[[g] + [0.0] * 10]], dtype=F64), Glucose()
    u = torch.zeros(1, 1, 1, dtype=F64)
    assert -101 < c.reward_rate(y, u) <= 0 and c.severity(y, u) == risk(y[..., 0]) >= 0


def test_risk_is_known_at_its_marks():
    marks = risk(torch.tensor([20.0, 112.5, 600.0, 70.0, 180.0], dtype=F64))
    assert marks.tolist() == pytest.approx([100, 0, 100, 7.76, 7.73], abs=0.06)


def test_every_gram_arrives():
    "Without insulin's action or the kidneys, a day's meals end in the blood: 800 mg a gram in 1.6 dL/kg."
    c = Glucose(1, renal=0.0, i_b=15.0)
    x = c.start(torch.full((1, 1, 9), 0.5, dtype=F64))
    end = c.to_physical(outcome(c, x, basal_action(c), 40.0, **steps(c)).x)[0, 0]
    assert end[0].item() == pytest.approx(125 + 800 * (45 + 60 + 65 + 15) / 112, rel=1e-6)
    assert torch.allclose(end[3:], c.to_physical(x)[0, 0, 3:])


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_meals_are_on_the_quarter_and_announced_in_order(seed):
    hours, grams = meal_plan(numbers(seed, 5, 8))
    assert (hours * 4 == (hours * 4).round()).all() and (hours.diff(dim=-1) > 0).all()
    assert (grams > 0).all() and hours.max() < 24
    for hour in (0.0, 7.9, 13.1, 17.0):
        wait, size = next_meal(torch.full((5,), hour, dtype=F64), hours, grams)
        for row in range(5):
            later = [(h - hour, g) for h, g in zip(hours[row].tolist(), grams[row].tolist(), strict=True) if h > hour]
            assert (wait[row].item(), size[row].item()) == pytest.approx(later[0] if later else (24, 0))


def test_announcing_changes_what_is_seen_and_nothing_else():
    quiet, told = Glucose.virtual(3), Glucose.virtual(3, announced=True)
    x, u = quiet.start(numbers(3, 3, 1, 9)), numbers(4, 3, 1, 1)
    assert torch.equal(told.start(numbers(3, 3, 1, 9)), x) and torch.equal(
        outcome(quiet, x, u, 5.0, **steps(quiet)).x, outcome(told, x, u, 5.0, **steps(told)).x)
    assert [q.name for q in told.states[3:]] == ["next_meal_in", "next_meal"] and len(quiet.states) == 3
    assert told.select([1]).announced and told.to("cpu").announced and len(told.charting.slot_h) == 5
    seen = told.to_physical(told.visible(x, torch.zeros(3, 1, dtype=F64)))
    assert torch.allclose(seen[..., 3], told.to_physical(x)[..., 3])  # the first meal is still to come


def test_controllers():
    c, x, _ = patients(Glucose, 30)
    y = c.to_physical(x)
    assert (proportional(c, y) >= 0).all() and torch.allclose(
        proportional(c, torch.full_like(y, 110.0)), basal_action(c))
    held, led, low = x, x, []
    ill = torch.zeros(2, dtype=F64)
    for quarter in range(96):
        a = outcome(c, held, basal_action(c), 0.25, quarter / 4, **steps(c))
        b = outcome(c, led, proportional(c, c.to_physical(led)), 0.25, quarter / 4, **steps(c))
        held, led, ill = a.x, b.x, ill + torch.stack([a.severity.mean(), b.severity.mean()])
        low.append(c.to_physical(held)[..., 0])
    assert ill[1] < 0.25 * ill[0] and time_shares(torch.stack(low))["low"].max() == 0
    with pytest.raises(ValueError, match="above the pump"):
        basal_action(Glucose(1, i_b=50.0, v_i=40.0))


# ---- ventilation


def test_eighteen_settings():
    grid, c = ventilator_settings(), Ventilation()
    assert len(grid) == 18
    for peep, f, vt in itertools.product(range(2), range(3), range(3)):
        given = [v.item() for v in c.settings(grid[9 * peep + 3 * f + vt])]
        assert given == pytest.approx([(5, 10)[peep], (0.3, 0.45, 0.7)[f], (6, 7.25, 9)[vt]])


@settings(max_examples=50, deadline=None)
@given(p=st.floats(20, 600), hb=st.floats(5, 20), more=st.floats(0, 400))
def test_oxygen_content_has_an_inverse(p, hb, more):
    p, hb = torch.tensor([p], dtype=F64), torch.tensor([hb], dtype=F64)
    assert oxygen_pressure(oxygen_content(p, hb), hb, p + more).item() == pytest.approx(p.item(), rel=1e-6)


def test_trade_offs():
    c = Ventilation.virtual(12)
    grid = ventilator_settings()[None].expand(12, 18, 3)
    y = c.to_physical(outcome(c, c.start(numbers(1, 12, 18, 5)), grid, 12.0, **steps(c)).x)
    pressure, spo2, _, mbp = (m.reshape(12, 2, 3, 3) for m in c.measures(y, grid).unbind(-1))
    opened, paco2 = y[..., 2].reshape(12, 2, 3, 3), y[..., 1].reshape(12, 2, 3, 3)
    assert (opened[:, 1] > opened[:, 0]).all() and (mbp[:, 1] < mbp[:, 0]).all()
    assert (pressure[:, 1] < pressure[:, 0]).all() and (pressure.diff(dim=-1) > 0).all()
    assert (paco2.diff(dim=-1) < 0).all() and (spo2.diff(dim=2) > 0).all()
    assert opened.diff(dim=2).abs().max() < 1e-2  # oxygen opens nothing; the starts differed


def test_reward_of_the_task():
    c = Ventilation()
    rest = dict(zip(("both", "one", "none"), (2.0, 0.5, -1.0), strict=True))
    states = dict(both=[82.0, 40, 1.0, 75, 24], one=[82.0, 40, 1.0, 60, 24], none=[50.0, 40, 1.0, 60, 24])
    u = torch.zeros(1, 1, 3, dtype=F64)
    for name, y in states.items():
        y = torch.tensor([[y]], dtype=F64)
        assert c.reward_rate(y, u).item() == pytest.approx(rest[name], abs=0.03)
        assert c.severity(y, u).item() == pytest.approx((2 - rest[name]) / 1.5, abs=0.02)
    closed = torch.tensor([[[82.0, 40, 0.0, 75, 24]]], dtype=F64)
    price = 0.05 * (9 / (0.77 / 2) - 15)
    full = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=F64)
    assert (c.reward_rate(closed, u * 0) - c.reward_rate(closed, full)).item() == pytest.approx(
        price - 0.05 * (6 / (0.77 / 2) - 15), abs=1e-9)
    assert saturation(torch.tensor(82.0)).item() == pytest.approx(95.3, abs=0.1)
