"The front door of off-policy evaluation: forms of policies, patients as the unit, flags, and what is refused."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from worlds import world

from medsim.agents.behaviour import reliability
from medsim.data.actions import Treatments
from medsim.data.episodes import Episodes
from medsim.ope.diagnostics import support, tail_index, weight_report
from medsim.ope.estimate import (
    Limits,
    always,
    compare,
    draw_estimates,
    evaluate,
    every_action,
    interval,
    multiplicities,
    ratios,
)
from medsim.ope.fqe import Linear, Network, Table, Trees, fqe, steps_of

MDP = world()
UNIFORM = MDP.uniform_policy()
TILTED = np.tile([0.5, 0.3, 0.2], (MDP.n_states, 1))
LOG = MDP.rollout(UNIFORM, 400, seed=1)
NUMBER = LOG.normaliser.only("state")


def state(obs: np.ndarray) -> np.ndarray:
    return np.clip(np.round(NUMBER.inverse(obs[..., :1].astype(float))[..., 0]), 0, MDP.n_states - 1).astype(int)


def at_steps(policy: np.ndarray, log: Episodes = LOG) -> np.ndarray:
    return policy[state(log.obs.reshape(-1, log.obs.shape[-1]))].reshape(*log.mask.shape, -1)


class Actor:
    "A policy that can only be asked for log-probabilities."

    def log_prob(self, obs, action):
        return torch.log(torch.as_tensor(TILTED)[torch.as_tensor(state(obs.numpy())), action])


def test_four_forms_of_one_policy():
    whole = at_steps(TILTED)
    chosen = np.take_along_axis(whole, LOG.action[..., None], -1)[..., 0]
    a, *others = (evaluate(LOG, p) for p in (whole, chosen, Actor(), TILTED))
    for other in others: pd.testing.assert_frame_equal(a, other)
    np.testing.assert_allclose(ratios(LOG, whole)[LOG.mask], 3 * chosen[LOG.mask], rtol=1e-6)


def test_a_model_takes_every_form_that_has_all_probabilities():
    how = dict(estimators=("DM", "WDR"), model=Table(MDP.n_states, 3, state))
    whole = at_steps(TILTED)
    a, *others = (evaluate(LOG, p, **how) for p in (whole, Actor(), TILTED))
    for other in others: pd.testing.assert_frame_equal(a, other)
    chosen = np.take_along_axis(whole, LOG.action[..., None], -1)[..., 0]
    with pytest.raises(ValueError, match="policy: shape .* every action"): evaluate(LOG, chosen, **how)
    spec, none = Treatments(("fluid",), ("mL/h",), (0.0,), (500.0,)), np.zeros((*LOG.mask.shape, 1), np.float32)
    doses = replace(LOG, action_spec=spec, action=none)
    with pytest.raises(ValueError, match="policy: doses are continuous"): every_action(Actor(), doses)


def test_truth_lies_in_most_intervals():
    "Sixty data sets of 400 stays, a policy that is near: 95 % intervals of every estimator by weights, unless flagged."
    near = 0.75 * UNIFORM + 0.25 * TILTED
    truth, parts = MDP.evaluate(near).value, []
    names = ("WIS", "CWPDIS", "PDIS", "IS")
    for seed in range(60):
        log = MDP.rollout(UNIFORM, 400, seed=100 + seed)
        t = evaluate(log, near, estimators=names)
        parts.append(t.assign(holds=(t.ci_low <= truth) & (truth <= t.ci_high)))
    good = pd.concat(parts).query("flag == ''").groupby("estimator").holds.agg(["size", "mean"])
    assert good.loc["WIS", "size"] > 45 and set(good.index) == set(names) and (good["mean"] >= 0.85).all(), good


def test_the_clinicians_against_themselves():
    t = evaluate(LOG, at_steps(UNIFORM), estimators=("WIS", "IS"), against={"clinicians": None})
    same = t[t.against == "clinicians"]
    assert np.allclose(same[["value", "ci_low", "ci_high"]], 0, atol=1e-6)
    assert t[t.against == ""].value.to_numpy() == pytest.approx(LOG.returns().mean(), rel=1e-5)


def test_patients_are_the_unit():
    "Every patient twice over: twice the stays, no more patients, the same interval; as strangers, a narrower one."
    twice = LOG.select(np.tile(np.arange(len(LOG)), 2))
    p = at_steps(TILTED)
    once, both = evaluate(LOG, p, method="percentile"), evaluate(twice, np.concatenate([p, p]), method="percentile")
    pd.testing.assert_series_equal(once.ci_low, both.ci_low)
    assert (both.n == 2 * once.n).all() and (both.patients == once.patients).all()
    strangers = replace(twice, ids=twice.ids.assign(subject_id=np.arange(len(twice))))
    apart = evaluate(strangers, np.concatenate([p, p]), method="percentile")
    assert (apart.ci_high - apart.ci_low < 0.85 * (once.ci_high - once.ci_low)).all()


def test_intervals_are_scipys():
    x = np.random.default_rng(0).exponential(size=80)
    left = (x.sum() - x) / 79
    ours = np.concatenate([c @ x / 80 for c in multiplicities(80, 20_000, 0)])
    for method, name in (("bca", "BCa"), ("percentile", "percentile")):
        low, high = interval(x.mean(), left, ours, method, 0.95)
        theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method=name, rng=1).confidence_interval
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    low, high = interval(x.mean(), left, x, "jackknife", 0.9)  # of a mean: the textbook's
    half = stats.norm.ppf(0.95) * stats.sem(x)
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), rel=1e-9)
    assert np.isnan(interval(1.0, np.array([np.nan, 1.0]), x, "jackknife", 0.9)).all()
    assert np.isnan(interval(1.0, np.array([1.0]), x, "jackknife", 0.9)).all()


def test_the_same_seed_gives_the_same_table():
    a, b, c = (evaluate(LOG, at_steps(TILTED), method="bca", n_boot=100, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(a, b)
    assert not a.ci_low.equals(c.ci_low)
    assert sum(len(m) for m in multiplicities(5, 130, 0)) == 130
    assert all((m.sum(1) == 5).all() for m in multiplicities(5, 130, 0))


def test_no_overlap_is_flagged_and_not_ranked():
    never = np.zeros(LOG.mask.shape)
    table = compare(LOG, {"never": never, "near": at_steps(TILTED)}, estimators=("WIS", "IS"))
    lost = table[table.policy == "never"]
    assert np.isnan(lost.value[lost.estimator == "WIS"]).all() and lost["rank"].isna().all()
    assert lost.flag.str.contains("ESS 0").all() and lost.flag.str.contains("no overlap").any()
    near = table[(table.policy == "near") & (table.estimator == "WIS")]
    assert (near["rank"] == 1).all()
    assert len(draw_estimates(table, clinicians=0.5).lines) == 2 * 4 + 1


@pytest.mark.parametrize(("report", "word"), [
    ({"ess": 20.0}, "ESS 20"), ({"max_weight_share": 0.5}, "50 % of the weight"),
    ({"tail_index": 1.1}, "tail index 1.10"),
    ({"share_without": 0.99}, "99 % of the episodes"), ({"ess": float("nan")}, "ESS"),
    ({"mean_weight": 0.5}, "mean weight 0.50"), ({"mean_weight": 1.5}, "mean weight 1.50"),
])
def test_every_limit_flags(report, word):
    fine = {"ess": 500.0, "ess_fraction": 0.3, "max_weight_share": 0.01, "mean_weight": 1.0, "tail_index": 0.2,
            "share_without": 0.0}
    assert Limits().flag(fine) == "" and word in Limits().flag(fine | report)
    assert Limits().flag(fine, "PDIS") == "ESS 30 % of the episodes, too few for PDIS"
    near = fine | {"ess_fraction": 0.6}
    assert Limits().flag(near, "CWPDIS") == "" and Limits().flag(near, "PDIS") != ""
    assert Limits().flag(near | {"mean_weight": 0.9}) == ""
    assert "mean weight 0.90" in Limits().flag(near | {"mean_weight": 0.9}, "CWPDIS")


def test_with_a_model():
    truth = MDP.evaluate(TILTED).value
    how = dict(estimators=("DM", "DR", "WDR"), model=Table(MDP.n_states, 3, state))
    t = evaluate(LOG, at_steps(TILTED), **how)
    assert (abs(t.value - truth) < 0.06).all() and t.flag.tolist() == ["the model is taken as true", "", ""]
    q = v = np.zeros(LOG.mask.shape)
    none = evaluate(LOG, at_steps(TILTED), estimators=("DR", "PDIS"), model=(q, v))
    assert none.value[0] == pytest.approx(none.value[1])
    itself = evaluate(LOG, at_steps(TILTED), **how, against={"itself": TILTED})  # has a model of its own
    assert itself.value[itself.against == "itself"].to_numpy() == pytest.approx(0)


def counted(log: Episodes) -> np.ndarray:
    "Behaviour as it was counted in each state."
    counts = np.ones((MDP.n_states, 3)) * 0.1
    np.add.at(counts, (state(log.obs)[log.mask], log.action[log.mask]), 1)
    return counts / counts.sum(1, keepdims=True)


def test_fits_can_be_made_anew_in_every_replicate():
    how = dict(estimators=("WIS", "DM"), model=Table(MDP.n_states, 3, state), behaviour=counted, n_boot=30)
    few = LOG.select(np.arange(150))
    fixed, anew = (evaluate(few, TILTED, method="percentile", refit=r, **how) for r in (False, True))
    assert fixed.value.equals(anew.value) and anew.flag[1] == "" < fixed.flag[1]
    wide = anew.ci_high - anew.ci_low
    assert wide[1] > 1.5 * (fixed.ci_high - fixed.ci_low)[1]  # the model's own uncertainty
    assert ((anew.ci_low < anew.value) & (anew.value < anew.ci_high)).all()
    assert evaluate(few, TILTED, behaviour=counted).value[0] == evaluate(few, TILTED, behaviour=counted(few)).value[0]


def test_a_simulator_as_the_model():
    twin = MDP.rollout(TILTED, 400, seed=9)
    t = evaluate(LOG, TILTED, estimators=("DM",), model=twin)
    assert t.value[0] == pytest.approx(twin.returns().mean()) and t.flag[0] == "the model is taken as true"
    assert t.ci_high[0] - t.ci_low[0] == pytest.approx(2 * 1.96 * twin.returns().std(ddof=1) / 20, rel=1e-3)
    with pytest.raises(ValueError, match="50 episodes' subjects"):
        evaluate(LOG, TILTED, estimators=("DM",), model=twin.select(np.arange(350)))


def test_one_action_always():
    p = always(2, LOG)
    assert p.shape == (*LOG.mask.shape, 3) and (p[..., 2] == 1).all() and p.sum() == LOG.mask.size
    with pytest.raises(ValueError, match="action=3"): always(3, LOG)
    t = evaluate(LOG, TILTED, against={"never": always(0, LOG)}, estimators=("WIS",))
    assert t.flag[0] == "" and t.flag[1].startswith("never: ")  # the other side's weights count too


@pytest.mark.parametrize("make", [lambda: Linear(3), lambda: Trees(3, max_iter=20), lambda: Network(1, 3, steps=50)])
def test_regressions_come_near(make):
    some = LOG.select(np.arange(300))
    got, k = fqe(steps_of(some, at_steps(TILTED)[:300]), make(), iterations=15)
    first = (got.predict(some.obs[:, 0]) * TILTED[0]).sum(1).mean()
    assert k == 15 and abs(first - MDP.evaluate(TILTED).value) < 0.2


def test_steps_leave_out_what_was_cut_off():
    cut = replace(LOG, terminated=np.zeros_like(LOG.mask), truncated=LOG.terminated)
    whole, rest = steps_of(LOG, at_steps(TILTED)), steps_of(cut, at_steps(TILTED))
    assert len(whole.obs) == LOG.mask.sum() and len(rest.obs) == LOG.mask.sum() - len(LOG)
    assert (whole.policy.sum(1) == 0).sum() == len(LOG)  # nothing after the end


@pytest.mark.parametrize(("change", "message"), [
    (dict(policy="few"), "policy: episode .*: a state beyond the 2 of the table"),
    (dict(policy="twice"), "policy: episode 0, step 0: the probabilities do not sum to 1"),
    (dict(policy="short"), r"policy: shape \(400,"), (dict(policy="nan"), "policy: episode 0, step 0"),
    (dict(behaviour="zero"), "behaviour: episode 3, step 0: has probability 0"),
    (dict(estimators=("DR",)), "DR: give `model`"), (dict(estimators=("WISH",)), "unknown WISH"),
    (dict(by="stay"), "by='stay'"), (dict(method="normal"), "method='normal'"), (dict(gamma=2.0), "gamma"),
    (dict(refit=True, method="jackknife"), "refit=True needs"),
    (dict(refit=True, behaviour="zero"), "must be what can be fitted"),
    (dict(estimators=("DR",), model=LOG), "simulated episodes have no q"),
])
def test_what_does_not_fit_is_named(change, message):
    p = at_steps(TILTED)
    zero = LOG.behaviour_prob.copy()
    zero[3, 0] = 0
    forms = {"twice": 2 * p, "short": p[..., :2], "nan": p * np.nan, "zero": zero, "few": TILTED[:2]}
    given = {k: forms.get(v, v) if isinstance(v, str) else v for k, v in change.items()}
    policy = given.pop("policy", p)
    with pytest.raises(ValueError, match=message): evaluate(LOG, policy, n_boot=10, **given)


def test_episodes_without_probabilities():
    bare = replace(LOG, behaviour_prob=None)
    with pytest.raises(ValueError, match="fit a behaviour policy"): evaluate(bare, at_steps(TILTED))
    t = evaluate(bare, at_steps(TILTED), behaviour=at_steps(UNIFORM))
    assert t.value.to_numpy() == pytest.approx(evaluate(LOG, at_steps(TILTED)).value.to_numpy(), rel=1e-5)


def test_tail_support_and_reliability():
    assert tail_index(np.zeros(100)) == 0 and tail_index(np.full(50, -np.inf)) == np.inf
    report = weight_report(np.ones((50, 3)), np.ones((50, 3), bool))
    assert report["ess"] == pytest.approx(50) and report["max_weight_share"] == pytest.approx(0.02)
    p = at_steps(UNIFORM)
    s = support(p, p, LOG.action, LOG.mask)
    assert s.share["support mass"] == pytest.approx(1) and (s.of == LOG.mask.sum()).all()
    with pytest.raises(ValueError, match="policy: episode 0, step 0"): support(0 * p, p, LOG.action, LOG.mask)
    table, scores = reliability(p[LOG.mask], LOG.action[LOG.mask])
    assert scores["ece"] < 0.05 and table.n.sum() == 3 * LOG.mask.sum()
    with pytest.raises(ValueError, match="action: episode 0: must be an id in 0..2"):
        reliability(p[LOG.mask][:1], np.array([7]))
