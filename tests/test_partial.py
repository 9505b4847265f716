"The chart: nothing early, nothing from the neighbours, the same however time is cut, and as frequent as it says."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.core.counter import derive
from medsim.envs.partial import Chart
from medsim.sim.condition import Condition, Hazard, Quantity, Septic, Treatment, icu_charting
from medsim.sim.physiology import HIGH, LOW
from medsim.sim.simulator import Simulator

F64 = torch.float64
SEPTIC = {k: Septic(Simulator.virtual(k)) for k in (1, 2, 3)}
ICU = icu_charting()
ALWAYS = replace(ICU, calm=(1.0,) * 6, sick=(1.0,) * 6)
MIXED = replace(ICU, slot_h=(1 / 12, 1, 2.5, 1, 1, 1))


def keys(k, b, seed=0):
    return derive(torch.tensor(seed), torch.arange(k)[:, None], torch.arange(b))


class Waves:
    "Known true courses: every state a wave, its phase from the row's `phase` (K, B)."

    def __init__(self, phase):
        self.phase = phase
        self.asked = []

    def at(self, t):
        angle = 0.2 * t + self.phase
        return torch.stack([torch.sin(angle * (1 + 0.1 * i) + i) for i in range(6)], -1)

    def after(self, t0):
        def states_at(hours):
            assert (hours >= 0).all() and (hours.diff(dim=0) >= 0).all()
            self.asked.append(len(hours))
            return self.at(t0 + hours)

        return states_at


def filled(condition, cuts, *, b=2, seed=0, charting=ICU, horizon=48.0, dose=0.3, truth=None):
    "A chart recorded over the intervals between `cuts`, numbers or (K, B)."
    k = len(condition.ids)
    key = keys(k, b, seed)
    truth = truth or Waves((key % 1000).double())
    u = torch.full((k, b, 3), dose, dtype=F64)
    chart = Chart(condition, (k, b), horizon, charting=charting)
    start = torch.zeros(k, b, dtype=F64)
    chart.begin(key, truth.at(start), u)
    for cut in cuts:
        end = torch.as_tensor(cut, dtype=F64).expand(k, b)
        chart.record(truth.after(start), u, start, end - start)
        start = end
    return chart


def same(a, b):
    "Whether two charts hold the same measurements."
    for p, q in zip(a.pages, b.pages, strict=True):
        on = p.known.isfinite()
        assert torch.equal(p.known, q.known) and torch.equal(p.time[on], q.time[on])
        assert (p.value[on] - q.value[on]).abs().max() < 1e-9
    return True


# ---- the same chart


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.0, 48.0), max_size=8), st.integers(0, 10**6), st.sampled_from([ICU, MIXED]))
def test_chart_does_not_depend_on_the_cut(cuts, seed, charting):
    parts = filled(SEPTIC[2], [*sorted(cuts), 48.0], seed=seed, charting=charting)
    assert same(filled(SEPTIC[2], [48.0], seed=seed, charting=charting), parts)


def test_rows_may_be_cut_each_at_its_own_hours():
    own = [torch.tensor([[1.0, 30.0], [7.5, 7.5]]), torch.tensor([[40.0, 30.0], [7.5, 8.0]]), 48.0]
    assert same(filled(SEPTIC[2], [48.0]), filled(SEPTIC[2], own))  # among them intervals of no length


def test_cut_at_a_moment_of_measurement_counts_it_once():
    whole = filled(SEPTIC[1], [48.0], b=1)
    moments = sorted(whole.table(0, 0, 48.0).time_h.unique()[1:])
    assert same(whole, filled(SEPTIC[1], [*moments, 48.0], b=1))


def test_alone_or_in_company():
    many = filled(SEPTIC[1], [3.0, 48.0], b=50)
    key, one = keys(1, 50)[:, 17:18], Chart(SEPTIC[1], (1, 1), 48.0)
    truth, u = Waves((key % 1000).double()), torch.full((1, 1, 3), 0.3, dtype=F64)
    one.begin(key, truth.at(torch.zeros(1, 1, dtype=F64)), u)
    one.record(truth.after(0.0), u, 0.0, 48.0)
    for p, q in zip(one.pages, many.pages, strict=True):
        assert torch.equal(p.known[..., 0], q.known[..., 17]) and torch.equal(p.value[..., 0, :], q.value[..., 17, :])


def test_single_precision_clock():
    exact, chart = filled(SEPTIC[1], [48.0]), Chart(SEPTIC[1], (1, 2), 48.0, dtype=torch.float32)
    key, u = keys(1, 2), torch.full((1, 2, 3), 0.3)
    truth = Waves((key % 1000).double())
    chart.begin(key, truth.at(torch.zeros(1, 2)).float(), u)
    t = torch.zeros(1, 2)
    for _ in range(70):
        dt = torch.full((1, 2), 48 / 70)
        chart.record(lambda h, t=t: truth.at(t.double() + h.double()).float(), u, t, dt)
        t = t + dt
    a, b = (c.observe(47.9) for c in (exact, chart))
    assert b.value.dtype == torch.float32 and (a.since - b.since).abs().max() < 1e-4
    assert ((a.value - b.value).abs() > 1e-5).sum() <= 1  # a rounding may tip over


# ---- nothing early


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0, 47.0), st.integers(0, 10**6))
def test_observation_knows_nothing_of_what_comes_after(t, seed):
    key = keys(2, 2, seed)
    before = Waves((key % 1000).double())

    class Changed(Waves):
        def at(self, hours):
            return torch.where((torch.as_tensor(hours) <= t).expand(*hours.shape)[..., None], super().at(hours), -3.0)

    short = filled(SEPTIC[2], [t], seed=seed, truth=before).observe(t)
    long = filled(SEPTIC[2], [t, 48.0], seed=seed, truth=Changed(before.phase)).observe(t)
    for a, b in zip(short, long, strict=True): assert torch.equal(a, b)


def test_observation_is_the_newest_row_of_the_table():
    chart = filled(SEPTIC[2], [48.0], charting=MIXED)
    for t in (0.0, 0.3, 5.0, 29.7, 48.0):
        seen, table = chart.observe(t), chart.table(1, 1, t)
        assert (table.available_h <= t).all() and (table.available_h >= table.time_h).all()
        value = SEPTIC[2].to_physical(seen.value)[1, 1]
        for c, q in enumerate(SEPTIC[2].states):
            own = table[table.variable == q.name]
            if own.empty:
                assert seen.value[1, 1, c] == 0 and seen.since[1, 1, c] == 48
                continue
            last = own.loc[own.time_h.idxmax()]
            assert math.isclose(value[c], last.value, abs_tol=1e-9)
            assert math.isclose(seen.since[1, 1, c], t - last.time_h, abs_tol=1e-9)


def test_mask_tells_what_is_new():
    chart = filled(SEPTIC[2], [48.0])
    past = 0.0
    chart.observe(past)
    for t in (0.0, 0.5, 3.0, 3.0, 20.0, 48.0):
        mask, table = chart.observe(t).mask[0, 1], chart.table(0, 1, t)
        new = set(table.variable[table.available_h > past])
        assert {q.name for q, m in zip(SEPTIC[2].states, mask, strict=True) if m} == new
        past = t
    assert not chart.observe(10.0).mask.any() and not chart.observe(48.0).mask.any()


def test_delays():
    chart = filled(SEPTIC[1], [96.0], b=300, charting=ALWAYS, horizon=96.0)
    for page in chart.pages:
        late, median = (page.known - page.time).flatten(), page.group.delay_h
        if not median:
            assert (late == 0).all()
            continue
        assert (late > 0).all() and abs(late.median() / median - 1) < 0.02 and abs(late.log().std() - 0.4) < 0.01
    together = chart.table(0, 3, 96.0).query("variable in ('pao2', 'lactate')").groupby("time_h")
    assert (together.size() == 2).all() and (together.available_h.nunique() == 1).all()


def test_older_result_that_comes_late_is_news_but_not_the_last_value():
    slow = replace(ALWAYS, delay_h=(0, 0.06, 30.0, 0, 0, 0.06))  # 30 h and more or less; draws every hour
    chart = filled(SEPTIC[1], [96.0], b=5, charting=slow, horizon=96.0)
    age = torch.stack([96 - chart.observe(t).since[..., 2] + t for t in np.arange(60.0, 96)])  # hour of the last value
    assert (age.diff(dim=0) >= -1e-9).all()


# ---- as often, as noisy, as rounded as the charting says


@pytest.mark.parametrize("severity", [0.0, 0.5, 1.0, 3.0])
def test_frequencies(severity):
    class Flat(Septic):
        def severity(self, y, u): return torch.full_like(y[..., 0], 12 * severity)

    chart = filled(Flat(Simulator.virtual(1)), [100.0], b=200, horizon=100.0)
    w = min(severity, 1.0)
    for page in chart.pages:
        state = page.group.columns[0]
        p = (1 - w) * ICU.calm[state] + w * ICU.sick[state]
        drawn = page.known[1:].isfinite()
        assert abs(int(drawn.sum()) - drawn.numel() * p) < 4.5 * math.sqrt(drawn.numel() * p * (1 - p))
        inside = (page.time - torch.arange(101).view(-1, 1, 1) + 1)[1:][drawn]
        assert inside.min() >= 0 and inside.max() <= 1
        assert abs(inside.mean() - 0.5) < 4.5 / math.sqrt(12 * len(inside))
        admitted = page.known[0].isfinite().double().mean()
        expected = 0.8 if page.group.delay_h else 1.0
        assert abs(admitted - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / 200)


def test_severity_counts_at_the_moment_and_under_the_dose_in_force():
    class Dosed(Septic):
        def severity(self, y, u): return 12 * u[..., 1] + 0 * y[..., 0]

    chart = Chart(Dosed(Simulator.virtual(1)), (1, 400), 48.0, charting=replace(ICU, calm=(0.0,) * 6, sick=(1.0,) * 6))
    still, u = torch.zeros(1, 400, 6, dtype=F64), torch.zeros(1, 400, 3, dtype=F64)
    chart.begin(keys(1, 400), still, u)
    chart.record(lambda h: still.expand(len(h), 1, 400, 6), u, 0.0, 24.5)
    chart.record(lambda h: still.expand(len(h), 1, 400, 6), u + 1, 24.5, 23.5)
    for page in chart.pages:
        times = page.time[1:][page.known[1:].isfinite()]
        assert times.min() > 24.5 and len(times) == 400 * 23 + (times < 25).sum()
        assert 140 < (times < 25).sum() < 260


def test_noise_rounding_and_bounds():
    still = torch.zeros(1, 400, 6, dtype=F64)
    waves = Waves(torch.zeros(1, 400))
    waves.at = lambda t: still.expand(*t.shape, 6)
    chart = filled(SEPTIC[1], [48.0], b=400, charting=ALWAYS, truth=waves)
    truth = SEPTIC[1].to_physical(still)[0, 0]
    for page in chart.pages:
        for i, c in enumerate(page.group.columns):
            value, unit = page.value[..., i], 10.0 ** -ICU.decimals[c]
            assert (value / unit - (value / unit).round()).abs().max() < 1e-6
            assert value.min() >= LOW[c] and value.max() <= HIGH[c]
            sd = math.sqrt(ICU.noise[c] ** 2 + unit**2 / 12)  # rounding adds a uniform error
            if ICU.noise[c] >= unit / 2: assert abs(value.std() / sd - 1) < 0.03
            noise_of_mean = 4.5 * sd / math.sqrt(value.numel())
            assert abs(value.mean() - truth[c]) < max(noise_of_mean, 0.1 * unit)
    out = Waves(torch.zeros(1, 400))
    out.at = lambda t: still.expand(*t.shape, 6) + 50
    for page in filled(SEPTIC[1], [48.0], b=400, charting=ALWAYS, truth=out).pages:
        for i, c in enumerate(page.group.columns): assert (page.value[..., i] == HIGH[c]).all()


def test_noise_of_states_measured_together_is_independent():
    still = torch.zeros(1, 50, 6, dtype=F64)
    waves = Waves(torch.zeros(1, 50))
    waves.at = lambda t: still.expand(*t.shape, 6)
    gas = filled(SEPTIC[1], [48.0], b=50, charting=ALWAYS, truth=waves).pages[1].value.flatten(0, 2)
    assert abs(torch.corrcoef(gas.T)[0, 1]) < 4.5 / math.sqrt(len(gas))


# ---- rows, horizon, memory


def test_begin_on_some_rows_leaves_others_untouched():
    chart, other = filled(SEPTIC[3], [20.0]), filled(SEPTIC[3], [20.0])
    where = torch.zeros(3, 2, dtype=torch.bool)
    where[1, 0] = True
    garbage = torch.full((3, 2, 6), math.nan, dtype=F64)
    garbage[1, 0], u = 0.5, torch.zeros(3, 2, 3, dtype=F64)
    chart.begin(keys(3, 2, seed=9), garbage, u, where)
    t = torch.where(where, 0.0, 20.0)
    a, b = chart.observe(t), other.observe(20.0)
    for x, y in zip(a, b, strict=True): assert torch.equal(x[~where], y[~where])
    assert a.mask[1, 0].tolist() == [True, False, False, True, True, False]
    assert set(chart.table(1, 0, 0.0).time_h) == {0.0}
    fresh = Chart(SEPTIC[3], (3, 2), 48.0)
    fresh.begin(keys(3, 2, seed=9), torch.full_like(garbage, 0.5), u)
    for c, start in ((chart, t), (fresh, torch.zeros(3, 2))):
        c.record(lambda h: torch.zeros(*h.shape, 6, dtype=F64), u, start, torch.where(where, 12.5, 0.0))
    assert chart.table(1, 0, 12.5).equals(fresh.table(1, 0, 12.5))


def test_horizon():
    chart = filled(SEPTIC[2], [10.3], horizon=10.3, charting=replace(MIXED, calm=(1.0,) * 6, sick=(1.0,) * 6))
    for page in chart.pages: assert page.time[page.known.isfinite()].max() <= 10.3
    assert 0.98 <= len(chart.table(0, 0, 10.3).query("variable == 'spo2'")) / (10.3 * 12) <= 1.02
    u = torch.zeros(2, 2, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"row \(0, 0\).*horizon of 10.3 h"):
        chart.record(lambda h: h, u, 10.3, 1.0)


def test_memory_and_questions_do_not_grow():
    chart = Chart(SEPTIC[1], (1, 2), 100.0)
    truth, u = Waves(torch.zeros(1, 2)), torch.zeros(1, 2, 3, dtype=F64)
    chart.begin(keys(1, 2), truth.at(torch.zeros(1, 2)), u)
    where = [(p.known.data_ptr(), p.time.data_ptr(), p.value.data_ptr(), p.value.nbytes) for p in chart.pages]
    for t in range(100): chart.record(truth.after(float(t)), u, t, 1.0)
    assert where == [(p.known.data_ptr(), p.time.data_ptr(), p.value.data_ptr(), p.value.nbytes) for p in chart.pages]
    assert max(truth.asked) <= 2 * len(chart.pages)


class Hidden(Condition):
    "One charted state of two; it is shown with a clock's tick added."

    name, severity_name, severity_unit, draws = "hidden", "none", "", 1
    states = (Quantity("seen", "mg/dL", 0.0, 400.0),)
    treatments = (Treatment("dose", "U/h", 0.0, 1.0, (0.0, 1.0)),)
    hazards = (Hazard("seen", "mg/dL", 70.0, above=False),)
    horizon_h, dt_min_h, dt_max_h, ids = 24.0, 0.25, 4.0, ["a"]

    def to_physical(self, x): return 100 + 50 * x

    def to_normalised(self, y): return (y - 100) / 50

    def severity(self, y, u): return y[..., 1]

    def visible(self, x, t): return x[..., :1] + t[..., None]


def test_a_condition_with_hidden_states_and_its_own_view():
    one = icu_charting(["lactate"])
    charting = replace(one, slot_h=(1 / 12,), calm=(1.0,), sick=(1.0,), noise=(0.0,), decimals=(3,), delay_h=(0.0,))
    chart = Chart(Hidden(), (1, 1), 2.0, charting=charting)
    chart.begin(keys(1, 1), torch.zeros(1, 1, 2))
    chart.record(lambda h: torch.zeros(*h.shape, 2, dtype=F64), torch.zeros(1, 1, 1), 0.0, 2.0)
    table = chart.table(0, 0, 2.0)
    assert len(table) == 25 and list(table) == ["variable", "time_h", "available_h", "value"]
    assert np.allclose(table.value, 100 + 50 * table.time_h, atol=6e-4)
    assert abs(chart.observe(2.0).value.item() - table.time_h.max()) < 1e-4


# ---- errors


def test_errors():
    s, u, x = SEPTIC[2], torch.zeros(2, 1, 3, dtype=F64), torch.zeros(2, 1, 6, dtype=F64)
    for bad, words in [
        (lambda: Chart(Hidden(), (1, 1), 24.0), "hidden has no charting"),
        (lambda: Chart(Hidden(), (1, 1), 24.0, charting=ICU), "6 states, hidden has 1"),
        (lambda: Chart(s, (3, 1), 96.0), "2 patients"),
        (lambda: Chart(s, (2, 0), 96.0), "1 copy or more"),
        (lambda: Chart(s, (2, 1), math.nan), "horizon_h"),
        (lambda: Chart(s, (2, 1), 96.0, charting=replace(ICU, group=(0,) * 6)), "group 0 but has another"),
    ]:
        with pytest.raises(ValueError, match=words): bad()
    chart = Chart(s, (2, 1), 96.0)
    for bad, words in [
        (lambda: chart.observe(0.0), r"row \(0, 0\).*begin an episode"),
        (lambda: chart.table(0, 0, 0.0), r"row \(0, 0\).*begin an episode"),
        (lambda: chart.record(lambda h: h, u, 0.0, 1.0), "begin one first"),
        (lambda: chart.begin(torch.zeros(2, 1), x, u), "int64"),
        (lambda: chart.begin(keys(2, 2), x, u), r"key has rows \(2, 2\)"),
        (lambda: chart.begin(keys(2, 1), x[:1], u), r"x has rows \(1, 1\)"),
        (lambda: chart.begin(keys(2, 1), x, u, torch.ones(2, 1)), "bool"),
    ]:
        with pytest.raises(ValueError, match=words): bad()
    chart.begin(keys(2, 1), x, u)
    hours = torch.tensor([[1.0], [math.nan]])
    for bad, words in [
        (lambda: chart.record(lambda h: h, u, 1.0, 1.0), "where its chart ends"),
        (lambda: chart.record(lambda h: h, u, 0.0, hours), r"row \(1, 0\).*dt"),
        (lambda: chart.record(lambda h: h, u, 0.0, -hours), r"row \(0, 0\).*dt"),
        (lambda: chart.record(lambda h: h, u, 0.0, 96.1), "horizon of 96 h"),
        (lambda: chart.record(lambda h: h, u, 0.0, torch.ones(1, 2)), "dt has rows"),
        (lambda: chart.record(lambda h: h, u[:1], 0.0, 1.0), "u has rows"),
        (lambda: chart.observe(0.5), "record"),
        (lambda: chart.observe(hours - 1), r"row \(1, 0\)"),
        (lambda: chart.table(2, 0, 0.0), r"no row \(2, 0\)"),
        (lambda: chart.table(0, 0, 0.5), "until 0.5 h"),
    ]:
        with pytest.raises(ValueError, match=words): bad()
