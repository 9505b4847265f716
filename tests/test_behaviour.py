"The clinicians' policy: no look at the present or the future, nobody judged by a model that knew them, faults named."

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import world

from medsim.agents.behaviour import (
    Boosted,
    Calibrated,
    Frequencies,
    Logistic,
    Network,
    Recurrent,
    calibrated,
    compare,
    cross_fitted,
    draw_reliability,
    floored,
    folds_of,
    held_out,
    reliability,
    tempered,
    with_behaviour,
    with_features,
)
from medsim.data.actions import Continuous
from medsim.data.cohorts import sepsis3
from medsim.data.episodes import Episodes
from medsim.data.timeline import decision_steps
from medsim.ope.estimate import evaluate

torch.set_num_threads(1)
TOY = Episodes.example(n=60, t=8, seed=3)
MODELS = (
    Frequencies(), Logistic(C=0.1), Logistic(), Boosted(5), Boosted((2, 4, 8)), Network(hidden=(16,), epochs=5),
    Recurrent(units=8, epochs=3), Recurrent(cell="lstm", units=8, epochs=3), Calibrated(Logistic(C=1.0)),
)
STATELESS = [m for m in MODELS if not isinstance(m, Recurrent)]
quiet = pytest.mark.filterwarnings("ignore:.*never done in training")


@quiet
@pytest.mark.parametrize("config", MODELS, ids=repr)
def test_probabilities_everywhere_above_the_floor_and_the_same_again(config):
    some = (TOY.ids.fold == "train").to_numpy()
    fitted = config.fit(TOY, some, seed=5)
    p = fitted.on(TOY)
    assert p.shape == (60, 8, 25) and np.allclose(p.sum(-1), 1) and p.min() >= fitted.floor / 25
    assert np.allclose(p[~TOY.mask], 1 / 25)
    assert np.array_equal(p, config.fit(TOY, np.flatnonzero(some), seed=5).on(TOY))
    with_behaviour(TOY, p)


@quiet
@pytest.mark.parametrize("config", STATELESS, ids=repr)
def test_states_and_steps_agree(config):
    fitted = config.fit(TOY)
    assert np.allclose(fitted.probs(torch.as_tensor(TOY.obs[TOY.mask])).numpy(), fitted.on(TOY)[TOY.mask])


def test_nobody_moves_the_global_generator():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    wanted = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    for config in (Network(epochs=1), Recurrent(epochs=1), Boosted(2)): config.fit(TOY)
    assert torch.equal(torch.rand(3), wanted[0]) and np.array_equal(np.random.rand(3), wanted[1])  # noqa: NPY002


@quiet
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@settings(max_examples=10)
@given(t=st.integers(0, 7), seed=st.integers(0, 100))
def test_the_present_action_and_the_future_do_not_matter(cell, t, seed):
    fitted = RECURRENT.setdefault(cell, Recurrent(cell=cell, units=8, epochs=2).fit(TOY))
    rng = np.random.default_rng(seed)
    obs, action = TOY.obs.copy(), TOY.action.copy()
    obs[:, t + 1 :] = rng.normal(size=obs[:, t + 1 :].shape)
    action[:, t:] = rng.integers(25, size=action[:, t:].shape)
    before, after = fitted.on(TOY), fitted.on(replace(TOY, obs=obs, action=action))
    assert np.array_equal(before[:, : t + 1], after[:, : t + 1])
    if t < 7: assert not np.allclose(before[:, t + 1 :], after[:, t + 1 :])


RECURRENT: dict = {}


def test_a_memory_needs_no_company():
    "Neither the other episodes nor their lengths change what an episode gets."
    fitted = Recurrent(units=8, epochs=2).fit(TOY)
    short = np.flatnonzero(TOY.mask.sum(1) <= 5)[:3]
    assert np.allclose(fitted.on(TOY.select(short)), fitted.on(TOY)[short], atol=1e-6)


@quiet
@pytest.mark.parametrize("config", [Logistic(C=1.0), Logistic(), Boosted((2, 4)), Network(epochs=2),
                                    Recurrent(units=4, epochs=2), Calibrated(Logistic(C=1.0))], ids=repr)
def test_no_subject_is_judged_by_a_model_that_knew_it(config):
    subject = TOY.ids.subject_id[0]
    mine = (TOY.ids.subject_id == subject).to_numpy()
    other = replace(TOY, action=np.where(mine[:, None], (TOY.action + 7) % 25, TOY.action))
    p, q = (cross_fitted(e, config, folds=3, seed=1) for e in (TOY, other))
    if isinstance(config, Recurrent): p, q = p[:, :1], q[:, :1]  # its own past may count
    assert np.array_equal(p[mine], q[mine]) and not np.array_equal(p[~mine], q[~mine])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(2, 5), st.integers(0, 9))
def test_folds_and_held_out_keep_subjects_together(subjects, folds, seed):
    n = len(set(subjects))
    if folds > n:
        with pytest.raises(ValueError, match=f"folds={folds}"): folds_of(subjects, folds, seed)
    else:
        fold = folds_of(subjects, folds, seed)
        sizes = [len({s for s, f in zip(subjects, fold, strict=True) if f == k}) for k in range(folds)]
        assert sum(sizes) == n and max(sizes) - min(sizes) <= 1
    if n > 1:
        out = held_out(subjects, 0.3, seed)
        left, right = ({s for s, o in zip(subjects, out, strict=True) if o == k} for k in (True, False))
        assert left and right and not left & right


@given(st.integers(1, 30), st.integers(2, 6), st.floats(0.1, 20), st.floats(0.001, 0.5), st.integers(0, 99))
def test_temperature_and_floor_keep_order_and_sum(m, n, temperature, floor, seed):
    p = np.random.default_rng(seed).dirichlet(np.ones(n), m)
    q = floored(tempered(p, temperature), floor)
    assert np.allclose(q.sum(1), 1) and q.min() >= floor / n * (1 - 1e-9)
    assert (np.diff(np.take_along_axis(q, p.argsort(1), 1), axis=1) >= -1e-12).all()
    assert np.allclose(tempered(tempered(p, temperature), 1 / temperature), p, atol=1e-6)


def test_scores_by_hand():
    p, a = np.array([[0.75, 0.25], [0.35, 0.65]]), np.array([0, 0])
    table, scores = reliability(p, a)
    assert table.predicted.tolist() == [0.25, 0.35, 0.65, 0.75] and table.observed.tolist() == [0, 1, 0, 1]
    assert np.isclose(scores["brier"], (2 * 0.25**2 + 2 * 0.65**2) / 2)
    assert np.isclose(scores["ece"], (0.25 + 0.65 + 0.65 + 0.25) / 4)
    assert np.isclose(scores["ece_first"], (0.25 + 0.65) / 2)
    assert np.isclose(scores["log_loss"], -(np.log(0.75) + np.log(0.35)) / 2)


def test_temperature_mends_what_is_too_sure():
    "Labels drawn from p: to a model that says p squared, a temperature of 2 must be found."
    rng = np.random.default_rng(0)
    e = Episodes.example(n=2_000, t=6, seed=1)
    p = rng.dirichlet(np.full(25, 0.5), e.mask.shape)
    action = (rng.random((*e.mask.shape, 1)) > p.cumsum(-1)).sum(-1).clip(max=24)
    obs = replace(e, action=action)
    sharp = tempered(p, 0.5)
    own = dict(model=lambda x: sharp[e.mask][: len(x)], subjects=np.array([-1]), seen=np.ones(25, bool))
    fitted = replace(Frequencies(floor=1e-4).fit(e, [0]), **own)
    found = calibrated(fitted, obs)
    assert abs(found.temperature - 2) < 0.05
    before, after = (reliability(m.on(obs)[e.mask], action[e.mask])[1] for m in (fitted, found))
    assert after["ece_first"] < 0.02 < before["ece_first"]


def test_temperature_refuses_who_was_in_the_training():
    e = TOY
    first = held_out(e.ids.subject_id, 0.5)
    fitted = Logistic(C=1.0).fit(e, first)
    with pytest.raises(ValueError, match="were in the training"): calibrated(fitted, e)
    with pytest.raises(ValueError, match="no episode"): calibrated(fitted, e, [])
    assert calibrated(fitted, e, ~first).temperature > 0


@pytest.mark.parametrize(("config", "most"), [
    (Logistic(C=10.0), 0.05), (Boosted(40), 0.07), (Network(rate=1e-2, patience=3), 0.07),
    (Recurrent(units=16, rate=1e-2, patience=3), 0.1), (Frequencies(), 1.0)], ids=repr)
def test_known_clinicians_are_found(config, most):
    mdp = world()
    expert = np.random.default_rng(5).dirichlet(np.ones(3), mdp.n_states)
    log = mdp.rollout(expert, 600, seed=1)
    truth = expert[log.obs[..., 0].astype(int)]
    e = with_features(log, np.eye(mdp.n_states))
    p = cross_fitted(e, config, folds=2)
    error = np.abs(p - truth)[e.mask].sum(-1).mean() / 2
    if isinstance(config, Frequencies): assert error > 0.15
    else: assert error < most
    table = compare(e, {"truth": truth, "model": p})
    assert table.index[0] == "truth" and table.behind["model"] > 0


def test_weights_need_the_state():
    "The value of a policy by WIS: right with p(a | s), wrong with frequencies."
    mdp = world(seed=2)
    expert = np.random.default_rng(7).dirichlet(np.ones(3), mdp.n_states)
    wanted = tempered(expert, 0.6)
    log = mdp.rollout(expert, 4_000, seed=1)
    e = with_features(log, np.eye(mdp.n_states))
    probs = {c.__class__.__name__: cross_fitted(e, c, folds=2) for c in (Logistic(C=10.0), Frequencies())}
    weight = {n: evaluate(with_behaviour(log, p), wanted, n_boot=50).mean_weight.iloc[0] for n, p in probs.items()}
    assert abs(weight["Logistic"] - 1) < 0.15 < abs(weight["Frequencies"] - 1)


@quiet
@pytest.mark.parametrize("name", ["demo", "sample"])
def test_real_stays(name, request):
    store = request.getfixturevalue("mimic4_store" if name == "demo" else "sample_store")
    e = decision_steps(store, sepsis3(store))
    configs = Frequencies(), Logistic(C=0.03), Recurrent(units=16, patience=3)
    probs = {type(c).__name__: cross_fitted(e, c, folds=2) for c in configs}
    table = compare(e, probs)
    assert table.log_loss["Logistic"] < table.log_loss["Frequencies"] - 0.05
    assert (table.least >= 0.01 / 25 - 1e-12).all() and (table.steps == e.mask.sum()).all()
    known = with_behaviour(e, probs["Logistic"])
    assert known.behaviour_prob.min() > 0 and np.isclose(-np.log(known.behaviour_prob[e.mask]).mean(),
                                                         table.log_loss["Logistic"], atol=1e-4)


def test_an_action_never_done_in_training_is_possible_and_told():
    low = replace(TOY, action=np.minimum(TOY.action, 3))
    for config in (Logistic(C=1.0), Boosted(3)):
        fitted = config.fit(low)
        assert fitted.seen.sum() == 4
        with pytest.warns(UserWarning, match=r"never done in training \(actions .*24"): p = fitted.on(TOY)
        assert np.isclose(p[TOY.mask][:, 24], 0.01 / 25).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted.on(low)


@pytest.mark.parametrize("config", [Frequencies(), Logistic(), Boosted(5), Calibrated(Logistic())], ids=repr)
def test_one_action_only(config):
    same = replace(TOY, action=np.full_like(TOY.action, 7))
    assert (config.fit(same).on(same)[same.mask].argmax(-1) == 7).all()


@quiet
def test_faults_are_named():
    doses = replace(TOY, action=np.zeros((*TOY.mask.shape, 3)), action_spec=Continuous())
    for config in MODELS:
        with pytest.raises(ValueError, match="doses"): config.fit(doses)
    with pytest.raises(ValueError, match="doses"): cross_fitted(doses, Frequencies(), 2)
    with pytest.raises(ValueError, match="doses"): Logistic(C=1.0).fit(TOY).on(doses)
    with pytest.raises(ValueError, match="no episode"): Logistic(C=1.0).fit(TOY, [])
    with pytest.raises(ValueError, match="at least 2"): Network().fit(TOY, [0])
    with pytest.raises(ValueError, match="folds=500"): cross_fitted(TOY, Frequencies(), 500)
    with pytest.raises(ValueError, match="floor=0"): Logistic(floor=0.0)
    with pytest.raises(ValueError, match="floor=1.5"): Calibrated(Logistic(), floor=1.5)
    with pytest.raises(ValueError, match="share=1"): held_out([1, 2], 1.0)
    with pytest.raises(ValueError, match="rate"): Network(rate=1e20, epochs=2).fit(TOY)
    fitted = Logistic(C=1.0).fit(TOY)
    with pytest.raises(ValueError, match="NaN"): fitted.probs(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="shape"): fitted.probs(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="looks back"): Recurrent(epochs=1).fit(TOY).probs(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="normalised otherwise"): fitted.on(Episodes.example(n=60, t=8, seed=4))
    with pytest.raises(ValueError, match="shape"): with_behaviour(TOY, np.ones((3, 8, 25)))
    with pytest.raises(ValueError, match="sum to 1"): with_behaviour(TOY, np.ones((60, 8, 25)))
    with pytest.raises(ValueError, match="behaviour_prob"):
        with_behaviour(TOY, np.broadcast_to(np.arange(25) == 3, (60, 8, 25)).astype(float))
    with pytest.raises(ValueError, match="state"): with_features(TOY, np.eye(3))
    log = world().rollout(world().uniform_policy(), 5)
    with pytest.raises(ValueError, match="beyond"): with_features(log, np.eye(3))


def test_pictures():
    p = Frequencies().fit(TOY).on(TOY)
    ax = draw_reliability(TOY, {str(k): p for k in range(8)})
    assert len(ax.get_legend().get_texts()) == 8 and ax.get_xlabel()
