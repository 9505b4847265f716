"From charts to simulators: records, following, fitting, personalising, judging."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.data.cohorts import all_adults
from medsim.data.features import MEDGYM_6, SEPSIS_62
from medsim.data.timeline import irregular
from medsim.sim.fidelity import (
    by_stay,
    compare,
    decay_to_mean,
    forecastable,
    last_value,
    predictable,
    score,
    subject_splits,
)
from medsim.sim.filtering import Belief, LevelODE, PatientFilter, assimilate, drift_variance, spread_out, track
from medsim.sim.fitting import fit, fit_individuals, fit_population, held_out_noise, individual_job, population_member
from medsim.sim.hybrid import HybridODE, correction_net
from medsim.sim.members import FitConfig, FitState, Job, blackouts, epoch, new_members, run_fit, select_members
from medsim.sim.noise import ResidualNoise, fit_noise
from medsim.sim.odesolve import flow
from medsim.sim.personalise import personalise, until
from medsim.sim.physiology import STATES, MedGymODE, SepsisODE
from medsim.sim.records import Records, concatenate, parts, records, spread
from medsim.sim.simulator import Simulator

F64 = torch.float64


def chart_of(store, hours=24, **kw):
    how = dict(features=MEDGYM_6, window_h=(0, hours), clock="time", action="continuous", split=(0.6, 0.2, 0.2))
    return irregular(store, all_adults(store), **{**how, **kw})


@pytest.fixture(scope="module")
def chart(sample_store):
    return chart_of(sample_store)


@pytest.fixture(scope="module")
def r(chart) -> Records:
    return records(chart)


@pytest.fixture(scope="module")
def population(r) -> Simulator:
    return fit(r, FitConfig(hidden=(4,), epochs=4), progress=False)


# ---- hybrid


@settings(max_examples=3)
@given(s=st.floats(0.5, 36), t=st.floats(0.5, 36), seed=st.integers(0, 99), acts=st.booleans(), sepsis=st.booleans())
def test_hybrid_is_a_flow(s, t, seed, acts, sepsis):
    net = correction_net((16,), seed=[seed, seed + 1], acts=acts)
    net.weight[-1].data *= 50
    level = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    ode = HybridODE((SepsisODE if sepsis else MedGymODE)(2), net, level, acts=acts).requires_grad_(False)
    gen = torch.Generator().manual_seed(seed)
    x, u = torch.randn(2, 3, 6, generator=gen, dtype=F64), torch.rand(2, 3, 3, generator=gen, dtype=F64)
    gap = flow(ode.rate, flow(ode.rate, x, u, s), u, t, s) - flow(ode.rate, x, u, s + t)
    assert gap.abs().max() < 1e-4


def test_hybrid_without_actions_answers_to_treatment_through_the_mechanism_alone():
    ode = HybridODE(SepsisODE(), correction_net((8,), seed=[0])).requires_grad_(False)
    x = torch.zeros(1, 1, 6, dtype=F64)
    more, less = (ode.rate(x, torch.full((1, 1, 3), v, dtype=F64)) for v in (0.6, 0.1))
    bare = [SepsisODE().rate(x, torch.full((1, 1, 3), v, dtype=F64)) for v in (0.6, 0.1)]
    assert torch.allclose(more - less, bare[0] - bare[1])


# ---- records


@settings(max_examples=40)
@given(st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.floats(0.2, 3))
def test_parts_fill_every_gap(gaps, longest):
    length = max(map(len, gaps))
    dt, mask = np.zeros((len(gaps), length)), np.zeros((len(gaps), length), bool)
    for n, row in enumerate(gaps): dt[n, : len(row)], mask[n, : len(row)] = row, True
    count = parts(dt, mask, longest)
    source, last, there = spread(count)
    stay = np.arange(len(gaps))[:, None]
    step = np.where(there, dt[stay, source] / np.maximum(count[stay, source], 1), 0)
    assert np.allclose(step.sum(1), dt.sum(1)) and step.max() <= longest * (1 + 1e-5)
    assert (last.sum(1) == mask.sum(1)).all() and (there.sum(1) == count.sum(1)).all()


def test_records_keep_every_measurement_at_its_time(chart, r):
    assert int(r.observed.sum()) == int(chart.observed.sum()) and float(r.dt.max()) <= 1 + 1e-6
    seen, kept = r.observed.any(-1), chart.observed.any(-1)
    assert np.allclose(r.t[seen].numpy(), chart.time_h[kept], atol=1e-3)
    assert ((r.u >= 0) & (r.u <= 1)).all() and (r.dt[~r.mask] == 0).all()


@pytest.mark.parametrize("what, said", [
    ("never", "lactate was never measured"), ("few", "lactate: 5 measurements"), ("constant", "lactate is constant"),
    ("nan", "NaN or infinite"), ("inf", "NaN or infinite"), ("unit", "check the unit"), ("negative", "check the unit"),
])  # fmt: skip
def test_records_refuse(chart, what, said):
    value, observed = chart.value.copy(), chart.observed.copy()
    if what == "never": observed[..., 5] = False
    if what == "few": observed.reshape(-1, 6)[np.nonzero(observed[..., 5].ravel())[0][5:], 5] = False
    if what == "constant": value[..., 5] = 2.0
    odd = {"nan": np.nan, "inf": np.inf, "unit": 9000.0, "negative": -1.0}.get(what)
    if odd is not None: value.reshape(-1, 6)[np.nonzero(observed[..., 5].ravel())[0][3], 5] = odd
    with pytest.raises(ValueError, match=said):
        records(replace(chart, value=value, observed=observed))


def test_records_refuse_other_columns(sample_store, chart):
    with pytest.raises(ValueError, match="MEDGYM_6"): records(chart_of(sample_store, features=SEPSIS_62))
    with pytest.raises(ValueError, match="continuous"): records(chart_of(sample_store, action="sepsis"))
    with pytest.raises(ValueError, match="order of their times"):
        records(replace(chart, time_h=np.where(chart.mask, chart.time_h[:, ::-1], 0.0)))


def test_concatenated_records_are_the_parts(r):
    both = concatenate([r.select([0, 1]), r.select([4])])
    assert both.stay_id.tolist() == [*r.stay_id[:2], r.stay_id[4]]
    length = int(r.mask[4].sum())
    assert torch.equal(both.x[2, :length], r.x[4, :length]) and not both.mask[2, length:].any()


# ---- following


def test_nothing_measured_nothing_learned():
    b = PatientFilter(2).start(3, torch.ones(2, 6))
    seen = torch.zeros(2, 3, 6, dtype=torch.bool)
    after = assimilate(b, torch.full((2, 3, 6), 9.0), seen, torch.ones(2, 1, 6))
    assert all(torch.equal(getattr(after, n), getattr(b, n)) for n in ("x", "level", "xx", "xl", "ll"))


@settings(max_examples=30)
@given(st.floats(0.01, 30), st.floats(0.01, 2), st.floats(0, 1), st.floats(0.05, 2), st.floats(0.05, 2))
def test_covariance_stays_one(dt, decay, share, drift, charting):
    one = torch.ones(1, 1, 6, dtype=F64)
    b = Belief(0 * one, 0 * one, one, 0.5 * one, one)
    for _ in range(3):
        xx, xl = spread_out(b, decay * one, share * decay * one, drift * one, dt * one)
        b = assimilate(Belief(b.x, b.level, xx, xl, b.ll), one, one.bool(), charting * one)
        assert (b.xx >= 0).all() and (b.ll >= 0).all() and (b.xx * b.ll - b.xl**2 >= -1e-9).all()


def test_noise_over_two_intervals_is_noise_over_both():
    q, d, s, t = (torch.tensor(v, dtype=F64) for v in (0.4, 0.3, 2.0, 5.0))
    twice = drift_variance(q, d, s) * torch.exp(-2 * d * t) + drift_variance(q, d, t)
    assert torch.isclose(twice, drift_variance(q, d, s + t))


def test_no_prediction_knows_what_comes_later(r, population):
    one = population_member(population)
    later = r.t > 12
    changed = replace(r, x=r.x + 2.0 * later[..., None] * r.observed)
    with torch.no_grad(): a, b = (track(one.ode, one.prior, v).mean[0] for v in (r, changed))
    before = (r.t <= 12) & r.mask
    assert torch.equal(a[before], b[before]) and not torch.equal(a, b)


def test_paired_members_are_members_alone(r):
    some = r.select([3, 1, 7])
    prior, ode = PatientFilter(3), LevelODE(3)
    ode.log_pull.data += torch.tensor([[-1.0], [0.0], [1.0]])
    together = track(ode, prior, some, paired=True).mean
    for k in range(3):
        alone = LevelODE(1)
        alone.log_pull.data = ode.log_pull.data[k : k + 1]
        assert torch.allclose(track(alone, PatientFilter(1), some.select([k])).mean[0, 0],
                              together[k, 0, : int(some.mask[k].sum())], atol=1e-6)


def test_order_of_stays_does_not_matter(r):
    turned = r.select(np.arange(len(r))[::-1])
    a, b = (track(LevelODE(), PatientFilter(), v).mean[0] for v in (r, turned))
    assert torch.equal(a, b.flip(0))


# ---- fitting


def small_job(r: Records) -> Job:
    train = r.observed[None] & torch.as_tensor(r.fold == "train")[None, :, None, None]
    return Job(r, train, r.observed[None] & torch.as_tensor(r.fold == "val")[None, :, None, None], seed=3)


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_is_uninterrupted(r, tmp_path, monkeypatch, stop):
    "An interrupt in the middle of an epoch; what was written before it is gone on from, bit for bit."
    config, job, file = FitConfig(hidden=(4,), epochs=5), small_job(r), tmp_path / "fit.safetensors"
    whole = run_fit(FitState(new_members(config, [1]), config), job, progress=False).state_dict()
    import medsim.sim.members as room

    real = room.epoch

    def interrupted(state, job):
        if len(state.history) == stop: raise KeyboardInterrupt
        real(state, job)

    monkeypatch.setattr(room, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(FitState(new_members(config, [1]), config), job, checkpoint=file, every=1, progress=False)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["fit.safetensors"]
    again = run_fit(FitState(new_members(config, [1]), config), job, checkpoint=file, progress=False).state_dict()
    assert all(torch.equal(v, again[n]) for n, v in whole.items())


def test_checkpoint_of_another_fit_is_refused(r, tmp_path):
    config, job, file = FitConfig(hidden=(), epochs=2), small_job(r), tmp_path / "fit.safetensors"
    run_fit(FitState(new_members(config, [1]), config), job, checkpoint=file, progress=False)
    other = FitConfig(hidden=(), epochs=3)
    for state, j in ((FitState(new_members(other, [1]), other), job),
                     (FitState(new_members(config, [1]), config), replace(job, seed=4))):
        with pytest.raises(ValueError, match="other records, seed or configuration"):
            run_fit(state, j, checkpoint=file, progress=False)
    file.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"fit\.safetensors is not a checkpoint"):
        run_fit(FitState(new_members(config, [1]), config), job, checkpoint=file, progress=False)


def test_a_fit_learns(r):
    config, job = FitConfig(hidden=(), epochs=8, blackout=0.0), small_job(r)
    state = FitState(new_members(config, [0]), config)
    run_fit(state, job, progress=False)
    assert state.history[-1]["train"][0] < state.history[0]["train"][0] - 0.1


def test_a_loss_that_is_not_finite_names_the_member(r):
    config = FitConfig(hidden=(), epochs=2)
    state = FitState(new_members(config, [0, 1]), config)
    state.members.prior.log_drift.data[1] = 400.0
    with pytest.raises(ValueError, match=r"members \[1\]"): epoch(state, small_job(r))


def test_blackouts_are_drawn_by_seed_and_epoch(r):
    config = FitConfig(blackout=0.5)
    a, b, c = (blackouts(r, config, 0, e) for e in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and not blackouts(r, FitConfig(blackout=0.0), 0, 1).any()


@pytest.mark.parametrize(
    "wrong", [dict(physics="x"), dict(epochs=0), dict(lr=-1.0), dict(blackout=2.0), dict(bound=0.0)]
)
def test_config_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): FitConfig(**wrong)


def test_folds_that_are_missing(r):
    with pytest.raises(ValueError, match="no stay is in the val fold"):
        fit_population(r.select(r.fold == "train"), FitConfig(epochs=1), progress=False)
    with pytest.raises(ValueError, match="too few measurements"): individual_job(r, 0, min_observed=10_000)
    with pytest.raises(ValueError, match="reference"): fit(r, FitConfig("none"))


def test_fitted_simulator_saves_and_loads(population, tmp_path):
    population.save(tmp_path / "sim")
    loaded = Simulator.load(tmp_path / "sim")
    x, u = population.initial(2), torch.full((1, 2, 3), 0.3)
    assert torch.equal(loaded.flow(x, u, 5.0), population.flow(x, u, 5.0)) and loaded.meta == population.meta
    assert torch.equal(loaded.prior.log_drift, population.prior.log_drift)


def test_select_members_repeats(population):
    one = population_member(population)
    three = select_members(one, [0, 0, 0])
    assert three.k == 3 and torch.equal(three.ode.physics.theta[2], one.ode.physics.theta[0])


# ---- noise


def test_noise_keeps_the_fits_own_where_errors_are_few(population, r):
    noise, kept = held_out_noise(population_member(population), r.select(r.fold != "test"), 0)
    assert isinstance(noise, ResidualNoise) and set(kept) <= set(STATES) and torch.isfinite(noise.drift).all()


def test_noise_refuses():
    e, seen = np.zeros((40, 6)), np.ones((40, 6), bool)
    with pytest.raises(ValueError, match="spo2: 5 held-out errors"):
        fit_noise(e, np.ones(40), seen & (np.arange(40) < 5)[:, None], np.ones(6))
    e[3, 0] = np.nan
    with pytest.raises(ValueError, match="spo2: 1 held-out errors are not finite"):
        fit_noise(e, np.ones(40), seen, np.ones(6))


# ---- personalising


def test_personal_level_moves_with_the_chart_and_nothing_later(population, r):
    some = r.select([0, 1, 2])
    higher = replace(some, x=some.x + 1.0 * some.observed)
    a, b = (personalise(population, v, until_h=10.0) for v in (some, higher))
    assert (b.simulator.ode.level >= a.simulator.ode.level - 1e-6).all()
    later = replace(some, x=some.x + 5.0 * (some.observed & (some.t > 10.0)[..., None]))
    c = personalise(population, later, until_h=10.0)
    assert torch.equal(c.simulator.ode.level, a.simulator.ode.level) and c.simulator.ids == some.stay_id.tolist()
    assert torch.allclose(a.hour, until(some, 10.0).t.max(1).values) and (a.hour <= 10.0 + 1e-5).all()


def test_adapting_changes_each_patients_mechanism(population, r):
    some = r.select([0, 1])
    a, b = personalise(population, some, adapt=2), personalise(population, some)
    assert not torch.equal(a.simulator.ode.physics.theta[0], a.simulator.ode.physics.theta[1])
    assert torch.equal(b.simulator.ode.physics.theta[0], b.simulator.ode.physics.theta[1])


def test_individuals_have_ids_and_weights_of_their_own(population, r):
    rich = r.select(np.argsort(-r.observed.sum((1, 2)).numpy())[:3])
    own = fit_individuals(population, rich, FitConfig(epochs=2, lr=0.03), chunk=2, progress=False)
    assert own.ids == rich.stay_id.tolist() and own.ode.net.k == 3
    some = own.select(own.ids[1:])
    x, u = own.initial(), torch.full((3, 1, 3), 0.3)
    assert torch.equal(some.flow(x[1:], u[1:], 7.0), own.flow(x, u, 7.0)[1:])
    with pytest.raises(ValueError, match="population's simulator"): personalise(own, r)


# ---- judging


def test_last_value_is_pandas_forward_fill(r):
    value, age = last_value(r)
    for n in (0, 5):
        rows = int(r.mask[n].sum())
        table = pd.DataFrame(np.where(r.observed[n, :rows], r.x[n, :rows], np.nan)).ffill().shift().fillna(0.0)
        assert np.allclose(table, value[n, :rows])
    assert (age >= 0).all() and not predictable(r)[:, 0].any()


def test_forecasts_count_only_what_was_seen_before(r):
    counted = forecastable(r, origin_h=8.0, hours=6.0)
    assert (r.t[counted.any(-1)] > 8).all() and (r.t[counted.any(-1)] <= 14).all()
    never = ~(r.observed & (r.t <= 8)[..., None]).any(1)
    assert not counted.any(1)[never].any()


def test_score_by_hand(r):
    splits = subject_splits(r.subject_id, n=3)
    zero = torch.zeros(3, *r.x.shape)
    table, counted = score(r, zero, predictable(r), splits), predictable(r)
    by_hand = []
    for train, test in zip(splits.train | splits.val, splits.test, strict=True):
        seen = r.x[test][..., 0][counted[test][..., 0]]
        by_hand.append((seen**2).mean() / r.x[train][..., 0][r.observed[train][..., 0]].var())
    assert np.isclose(table.nmse["spo2"], np.mean(by_hand), rtol=1e-5)
    assert by_stay(r, r.x, counted).squared.sum() == 0


def test_comparison_is_paired(r):
    splits, gen = subject_splits(r.subject_id, n=2), torch.Generator().manual_seed(0)
    a = r.x + torch.randn(r.x.shape, generator=gen)
    twice = r.x + (a - r.x) * np.sqrt(2)
    table = compare(r, twice.expand(2, *r.x.shape), a.expand(2, *r.x.shape), predictable(r), splits, n_boot=50)
    assert np.allclose(table[["ratio", "low", "high"]], 2.0, atol=1e-4)


def test_decay_to_mean_is_between_the_value_and_the_mean(r):
    train = torch.as_tensor(r.fold == "train")
    value, _ = last_value(r)
    p = decay_to_mean(r, train)
    mean = (r.x[train] * r.observed[train]).sum((0, 1)) / r.observed[train].sum((0, 1))
    assert (torch.minimum(value, mean) - 1e-4 <= p).all() and (p <= torch.maximum(value, mean) + 1e-4).all()


def test_splits_share_no_subject(r):
    splits = subject_splits(r.subject_id, n=5)
    for s in range(5):
        folds = [set(r.subject_id[f[s].numpy()]) for f in (splits.train, splits.val, splits.test)]
        assert not (folds[0] & folds[1] or folds[0] & folds[2] or folds[1] & folds[2])


def test_on_the_demo_a_fit_beats_the_last_value(mimic4_store):
    "After twelve epochs SpO2 and urine of held-out subjects are predicted better than by carrying forward."
    r = records(chart_of(mimic4_store, split=(0.5, 0.1, 0.4)))
    one = fit_population(r, FitConfig(hidden=(), epochs=12), progress=False)
    with torch.no_grad(): mean = track(one.ode, one.prior, r).mean[0]
    test = torch.as_tensor(r.fold == "test")
    counted = predictable(r)[test]
    ours, theirs = ((((p[test] - r.x[test]) ** 2) * counted).sum((0, 1)) for p in (mean, last_value(r)[0]))
    assert ours[0] < theirs[0] and ours[4] < theirs[4]
