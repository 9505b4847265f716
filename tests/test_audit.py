"The virtual unit and the audit: what is seen at the bedside is what was studied, and claims are held against truth."

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from medsim.agents import bc, iql
from medsim.agents.behaviour import Boosted, Recurrent
from medsim.agents.tabular import QLearning
from medsim.envs.icu_sepsis import load_official
from medsim.ope.audit import (
    Mixed,
    Pipeline,
    behaviour_model,
    draw_gaps,
    pipeline,
    pipelines,
    repeated,
    scores,
    with_validation,
)
from medsim.ope.cohort import DRUG_MAX, Deployed, View, VirtualUnit, as_episodes, binned, deploy, record
from medsim.ope.estimate import evaluate

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*never done in training")  # units of the tests are small
UNIT = VirtualUnit(80, horizon_h=24)
KEPT, PEERS = record(UNIT), record(replace(UNIT, seed=1))


class Only:
    "One action for everybody."

    def __init__(self, action: int) -> None: self.action = action

    def probs(self, obs): return torch.nn.functional.one_hot(torch.full((len(obs),), self.action), 25).double()


# the unit


def test_the_same_seed_gives_the_same_record():
    again, other = record(UNIT), record(replace(UNIT, seed=2))
    for name in ("value", "since", "dose", "risk", "threshold"):
        assert np.array_equal(getattr(KEPT, name), getattr(again, name))
    assert not np.array_equal(KEPT.dose, other.dose)


def test_a_record_is_sound():
    n, h = UNIT.patients, UNIT.horizon_h
    assert KEPT.value.shape == KEPT.since.shape == (n, h + 1, 6) and KEPT.dose.shape == (n, h, 2)
    assert (KEPT.risk > 0).all() and (KEPT.dose >= 0).all() and (KEPT.dose <= DRUG_MAX + 1e-9).all()
    assert ((KEPT.since >= 0) & (KEPT.since <= np.arange(h + 1)[None, :, None] + h * (KEPT.value == 0))).all()
    assert np.isclose(KEPT.survival, np.exp(-KEPT.risk.sum(1))).all()
    assert ((KEPT.hours == h) | KEPT.died).all()


def test_deaths_follow_the_hazard():
    "Drawn again and again, as many die as should: within 4 standard errors."
    rng = np.random.default_rng(0)
    shares = [replace(KEPT, threshold=rng.exponential(size=UNIT.patients)).died.mean() for _ in range(200)]
    expected, p = 1 - KEPT.survival.mean(), KEPT.survival
    assert abs(np.mean(shares) - expected) < 4 * np.sqrt((p * (1 - p)).mean() / UNIT.patients / 200)


@pytest.mark.parametrize("view", [View(4), View(2, missing="mean"), View(8, missing="carry only"), View(1)])
def test_states_at_the_bedside_are_those_of_the_study(view):
    grid, kept = as_episodes(KEPT, view).action_spec, []

    def watched(env):
        kept.append(Deployed(Only(12), view, grid, env))
        return kept[-1]

    lived = as_episodes(record(replace(UNIT, patients=20, seed=3), watched), view, grid, followed=True)
    assert np.abs(np.stack(kept[0].states, 1) - lived.obs).max() < 1e-4
    assert (lived.action == 12).all() and lived.mask.all()


def test_concurrent_states_are_the_next_steps():
    aligned, concurrent = (as_episodes(KEPT, View(4, a), followed=True) for a in ("aligned", "concurrent"))
    assert np.array_equal(concurrent.obs[:, :-1, :12], aligned.obs[:, 1:, :12])
    assert np.array_equal(concurrent.obs[..., -3:], aligned.obs[..., -3:])  # doses before and the clock stay
    assert np.array_equal(concurrent.action, aligned.action)


def test_aligned_states_know_nothing_of_the_step():
    "Perturb all that was charted from hour 8 on: what was decided on until then is unchanged."
    later = KEPT.value.copy()
    later[:, 9:] += 1
    changed = as_episodes(replace(KEPT, value=later), View(4), followed=True)
    same = as_episodes(KEPT, View(4), followed=True)
    assert np.array_equal(changed.obs[:, :3], same.obs[:, :3])
    assert not np.array_equal(changed.obs[:, 3:], same.obs[:, 3:])


def test_bins():
    x, alive = np.arange(8.0).reshape(1, 8), np.arange(8)[None] < 6
    assert binned(x, 4, alive).tolist() == [[1.5, 4.5]] and binned(x, 2, alive)[0, 3] == 0
    for k in (1, 2, 4, 8):
        e = as_episodes(KEPT, View(k))
        assert e.returns().mean() == pytest.approx(1 - KEPT.died.mean())
        assert np.array_equal(e.dt.sum(1), KEPT.hours) and (e.terminated.sum(1) == 1).all()
        total = (e.dt[..., None] * binned(KEPT.dose, k, np.arange(24) < KEPT.hours[:, None])).sum((0, 1))
        np.testing.assert_allclose(total, KEPT.dose[np.arange(24) < KEPT.hours[:, None]].sum(0), rtol=1e-9)


def test_where_treatment_does_nothing_policies_are_worth_the_same():
    inert, grid = replace(UNIT, patients=30, effect=False), as_episodes(KEPT, View(4)).action_spec
    a, b = (deploy(inert, Only(k), View(4), grid).survival for k in (0, 24))
    np.testing.assert_allclose(a, b, atol=1e-9)
    a, b = (deploy(replace(inert, effect=True), Only(k), View(4), grid).survival for k in (0, 24))
    assert abs(a - b).max() > 0.01


@pytest.mark.parametrize(("make", "message"), [
    (lambda: VirtualUnit(3), "10 patients"), (lambda: VirtualUnit(review=0), "review"), (lambda: View(0), "step_h"),
    (lambda: View(4, "late"), "alignment='late'"), (lambda: View(missing="zero"), "missing='zero'"),
    (lambda: as_episodes(KEPT, View(5)), "step_h=5 does not divide"), (lambda: Pipeline(agent="DQN"), "agent='DQN'"),
    (lambda: Pipeline(soften=2), "soften=2"), (lambda: Pipeline(alignment="late"), "alignment='late'"),
    (lambda: behaviour_model(as_episodes(KEPT, View(8)), "mean"), "behaviour='mean'"),
])
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message): make()


# pipelines


def test_models_are_probabilities():
    e = as_episodes(KEPT, View(4))
    obs = torch.as_tensor(e.obs[e.mask])
    state, usual = behaviour_model(e, "state"), behaviour_model(e, "marginal")
    for model in (state, usual, Mixed(Only(3), state, 0.3)):
        p = model.probs(obs)
        assert p.shape == (len(obs), 25) and torch.allclose(p.sum(1), torch.ones(len(obs)).double(), atol=1e-6)
    assert Mixed(Only(3), state, 0.3).probs(obs)[:, 3].min() >= 0.7
    done, often = (np.asarray(m.probs(obs))[np.arange(len(obs)), e.action[e.mask]] for m in (state, usual))
    assert np.log(done).mean() > np.log(often).mean() + 0.1
    assert np.array_equal(np.asarray(state.probs(obs)), state.on(e)[e.mask])


def test_any_model_of_behaviour_judges_but_one_with_a_memory_cannot_act():
    claims = {m: pipeline(Pipeline(agent="clone", behaviour=m, step_h=8), kept=KEPT, peers=PEERS)
              for m in ("state", Boosted(rounds=5), Recurrent(epochs=2))}
    assert len({v.true for v in claims.values()}) == 1 and len({v.claimed for v in claims.values()}) == 3
    e = as_episodes(KEPT, View(8))
    with pytest.raises(ValueError, match="looks back along the episode"):
        deploy(replace(UNIT, patients=10), Recurrent(epochs=1).fit(e), View(8), e.action_spec)


@pytest.mark.parametrize("agent", ["clone", "one step", "value iteration", QLearning()])
def test_agents_run_through(agent):
    v = pipeline(Pipeline(agent=agent, soften=0.9, step_h=8), kept=KEPT, peers=PEERS)
    assert 0 < v.true < 1 and v.true_clinicians == PEERS.survival.mean() and v.gap == v.claimed - v.true
    assert v.holds == (v.low <= v.true <= v.high) and np.isclose(v.true_gain, v.true - v.true_clinicians)
    assert f"true: {100 * v.true:.1f} %" in str(v) and ("flagged: " in str(v)) == bool(v.flag)


@dataclass(frozen=True)
class Settings:
    "Of an agent of the house."

    action: int


def study(episodes, config, *, seed=0, progress=True):
    "An agent of the house that learns nothing."
    assert set(episodes.ids.fold) == {"train", "val"} and progress is False and seed == 5
    return SimpleNamespace(policy=Only(config.action))


def test_an_agent_of_the_house():
    v = pipeline(Pipeline(agent=(study, Settings(24)), soften=0.0, estimator="DM", seed=5), kept=KEPT, peers=PEERS)
    grid = as_episodes(KEPT, View(4)).action_spec
    assert v.true == deploy(PEERS.unit, Only(24), View(4), grid).survival.mean()
    assert v.flag == "the model is taken as true"


def test_agents_that_learn_from_logs():
    for agent in ((bc.train, bc.BC(steps=40, validate_every=20, hidden=(16,), select="validation")),
                  (iql.train, iql.IQL(steps=40, validate_every=20, hidden=(16,)))):
        v = pipeline(Pipeline(agent=agent, step_h=8), kept=KEPT, peers=PEERS)
        assert np.isfinite(v.claimed) and 0 < v.true < 1 and (v.low < v.claimed < v.high)


def test_validation_patients_are_some_of_the_training_patients():
    e = as_episodes(KEPT, View(8))
    train = e.select((e.ids.fold == "train").to_numpy())
    split = with_validation(train, 0.2)
    assert (split.ids.fold == "val").sum() == round(0.2 * len(train)) and (train.ids.fold == "train").all()
    assert set(split.ids.fold) == {"train", "val"} and split.ids.subject_id.equals(train.ids.subject_id)


def test_a_policy_is_learned_once():
    learned = []

    def counted(episodes, config, *, seed, progress):
        learned.append(config)
        return SimpleNamespace(policy=Only(config.action))

    done = {}
    for soften, estimator in ((0.0, "DM"), (0.0, "WIS"), (0.9, "WIS")):
        config = Pipeline(agent=(counted, Settings(3)), soften=soften, estimator=estimator, step_h=8)
        pipeline(config, kept=KEPT, peers=PEERS, done=done)
    assert learned == [Settings(3)]


def test_claims_are_those_of_the_front_door():
    config = Pipeline(agent=(study, Settings(3)), soften=0.5, step_h=8, seed=5)
    v = pipeline(config, kept=KEPT, peers=PEERS)
    e = as_episodes(KEPT, config.view)
    train, test = (e.select(((e.ids.fold == "train") == yes).to_numpy()) for yes in (True, False))
    b = behaviour_model(train, "state").on(test)
    p = 0.5 * b + 0.5 * (np.arange(25) == 3)
    t = evaluate(test, p, behaviour=b, estimators=("WIS",))
    assert v.claimed == pytest.approx(t.value[0]) and v.low == pytest.approx(t.ci_low[0]) and v.flag == t.flag[0]


def test_tables_of_pipelines_resume(tmp_path):
    few = replace(UNIT, patients=60)
    near = Pipeline(soften=0.9, step_h=8)
    configs = {"near": near, "dropped": replace(near, estimator="CWPDIS", ended="drop")}
    whole = pipelines(configs, few, 2, folder=tmp_path, progress=False)
    (tmp_path / "001.parquet").unlink()
    again = pipelines(configs, few, 2, folder=tmp_path, progress=False)
    pd.testing.assert_frame_equal(whole, again)
    assert (whole.groupby("repetition").true.nunique() == 1).all()  # one policy, two claims
    assert len(draw_gaps(whole).lines) == 2 * 2 * 2 + 1
    more = pipelines(configs | {"clone": replace(near, agent="clone")}, few, 1, folder=tmp_path, progress=False)
    pd.testing.assert_frame_equal(more[:2], whole[:2])  # only the new one was run
    alone = pipelines({"clone": near}, few, 1, folder=tmp_path, progress=False)  # known by its name
    pd.testing.assert_frame_equal(alone, more[2:].reset_index(drop=True))


# estimators against truth


def test_estimators_against_truth(tmp_path):
    mdp = load_official()
    expert = mdp.restrict(mdp.expert_policy)
    truth = {"expert": mdp.evaluate(expert).value}
    how = dict(sizes=(100, 200), repetitions=4, progress=False)
    a = repeated(lambda n, seed: mdp.rollout(expert, n, seed=seed), {"expert": expert}, truth, folder=tmp_path, **how)
    b = repeated(lambda n, seed: None, {"expert": expert}, truth, folder=tmp_path, **how)  # all of it is kept
    pd.testing.assert_frame_equal(a, b)
    s = scores(a)
    assert len(a) == 2 * 2 * 4 and (s.n == 4).all() and (s.rmse >= s.bias.abs() - 1e-12).all()
    own = a[(a.estimator == "WIS") & (a["size"] == 100)]
    assert s.loc[("WIS", 100, "expert"), "bias"] == pytest.approx((own.value - truth["expert"]).mean())
    with pytest.raises(ValueError, match="truth: lacks"): repeated(None, {"x": expert}, truth, **how)
