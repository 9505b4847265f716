"Support and guarded Q-learning: distances by hand, K that are K, a guard that is felt, policies that stay near."

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medsim.agents import cql, dqn, gcql
from medsim.agents.confined import Confined, GuardedPolicy, LikelyPolicy, likely
from medsim.agents.gcql import GCQL, Guarded, GuardedReplay
from medsim.agents.offline import look
from medsim.agents.policy import Actions, PolicyConfig, StackedPolicy
from medsim.agents.replay import Replay, lesson
from medsim.agents.support import (
    Support,
    SupportConfig,
    guard,
    halves,
    support_curves,
    support_of,
    support_table,
)
from medsim.data.actions import Continuous, Treatments, action_table, embed
from medsim.data.episodes import Episodes

torch.set_num_threads(1)
QUICK: dict[str, Any] = dict(steps=40, batch=32, rate=3e-3, hidden=(16,), validate_every=10)
TOY = Episodes.example(60)
BOTH = pytest.mark.parametrize("kind", ["centroid", "neighbour"])


def at(x: Any, dose: Any) -> Episodes:
    "One-step stays with one feature that matters, one dose that does."
    n = len(x)
    e = Episodes.example(n, 1)
    obs = np.column_stack([x, np.zeros(n)]).astype(np.float32)
    doses = np.column_stack([dose, np.full(n, 0.5), np.full(n, 0.5)])[:, None]
    return replace(e, obs=obs[:, None], final_obs=obs, action=doses, action_spec=Continuous(),
                   ids=e.ids.assign(fold="train", subject_id=np.arange(n)))


def same(a: StackedPolicy, b: StackedPolicy) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- distances


def test_distances_by_hand():
    e = at([0, 1, 2, 3, 4], [0.1, 0.3, 0.5, 0.7, 0.9])  # sd of x: sqrt 2, of the dose: .2 sqrt 2
    x, a = torch.tensor([[[2.0, 0], [2, 0]]]), torch.tensor([[[0.5, 0.5, 0.5], [0.9, 0.5, 0.5]]])
    centre = support_of(e, SupportConfig(kind="centroid"))
    torch.testing.assert_close(centre.distance(x, a), torch.tensor([[0.0, math.sqrt(2)]]), atol=1e-5, rtol=1e-5)
    assert math.isclose(centre.radius, 2, rel_tol=1e-5)  # of (0, .1) and (4, .9): sqrt(2 + 2)
    near = support_of(e, SupportConfig(share=0.4))
    known = halves(e, SupportConfig(share=0.4))[0].obs[:, 0, 0]
    z, z_dose = (known - 2) / math.sqrt(2), (0.1 + 0.2 * known - np.array([[0.5], [0.9]])) / (0.2 * math.sqrt(2))
    each = np.sort(np.hypot(z, z_dose), 1)
    np.testing.assert_allclose(near.distance(x, a)[0], each[:, 0], atol=1e-5)
    second = support_of(e, SupportConfig(share=0.4, nearest=2))
    np.testing.assert_allclose(second.distance(x, a)[0], each[:, 1], atol=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(5, 60), st.sampled_from(["centroid", "neighbour"]))
@hypothesis_settings(max_examples=20)
def test_all_actions_at_once_are_one_by_one(seed, nearest, most, kind):
    support = support_of(TOY, SupportConfig(kind=kind, nearest=nearest, most=most))
    x = torch.randn(1, 7, 2, generator=torch.Generator().manual_seed(seed))
    one = torch.stack([support.distance(x, torch.full((1, 7), a)) for a in range(25)], -1)
    torch.testing.assert_close(support.distances(x), one, atol=1e-4, rtol=1e-4)
    table = torch.as_tensor(action_table(TOY.action_spec))
    torch.testing.assert_close(one[..., 3], support.distance(x, table[3].expand(1, 7, -1)))


@given(st.integers(0, 10_000))
@hypothesis_settings(max_examples=20)
def test_more_reference_is_nearer_and_reference_itself_is_at_zero(seed):
    few, more = (support_of(TOY, SupportConfig(most=m)) for m in (20, 10_000))
    x = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(seed))
    assert (more.distances(x) <= few.distances(x) + 1e-5).all()
    reference, _ = halves(TOY.select((TOY.ids.fold == "train").to_numpy()))
    done = torch.as_tensor(reference.action[reference.mask])[None]
    assert more.distance(torch.as_tensor(reference.obs[reference.mask])[None], done).max() < 1e-4


@given(st.integers(0, 1_000), st.floats(0.1, 0.9), st.sampled_from(["stay_id", "subject_id"]))
@hypothesis_settings(max_examples=20)
def test_halves_share_no_stay(seed, share, by):
    config = SupportConfig(seed=seed, share=share, by=by)
    a, b = halves(TOY, config)
    assert len(a) + len(b) == len(TOY) and not set(a.ids[by]) & set(b.ids[by]) and len(a) and len(b)


@BOTH
@pytest.mark.parametrize("nearest", [1, 3])
def test_data_sets_side_by_side_are_each_alone(kind, nearest):
    many = [TOY.select(range(20)), TOY.select(range(20, 60))]
    config = SupportConfig(kind=kind, nearest=nearest, most=40)
    both, x = support_of(many, config), torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    for i in range(2):
        alone, mine = support_of(many[i], config), both.member(i)
        torch.testing.assert_close(alone.distances(x[i : i + 1]), both.distances(x)[i : i + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.radius, both.radius[i : i + 1])
        assert torch.equal(mine.distances(x[i : i + 1]), both.distances(x)[i : i + 1])


def test_support_is_its_tensors_and_settings():
    first = support_of(TOY, SupportConfig(nearest=2))
    again = Support(SupportConfig(**asdict(first.config)), first.state_dict())
    x = torch.zeros(1, 1, 2)
    assert torch.equal(first.distances(x), again.distances(x)) and not list(first.parameters())


def test_only_the_fold_is_read():
    other = (TOY.ids.fold != "train").to_numpy()
    spoiled = replace(TOY, obs=np.where(other[:, None, None], 1e20, TOY.obs).astype(np.float32))
    a, b = support_of(TOY).state_dict(), support_of(spoiled).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_never_varies_is_not_infinitely_far():
    support = support_of(at([0, 1, 2, 3], [0.5] * 4), SupportConfig(kind="centroid", floor=0.1))
    d = support.distance(torch.tensor([[[1.5, 0]]]), torch.tensor([[[0.7, 0.5, 0.5]]]))
    assert math.isclose(d, 2, rel_tol=1e-5)


def test_coordinates_of_grids_and_doses_agree():
    grid = Treatments(("a", "b"), ("mg", "mg"), (0.0, 10.0), (4.0, 30.0), ((0.0, 1.0, 4.0), (10.0, 30.0)))
    doses = Treatments(("a", "b"), ("mg", "mg"), (0.0, 10.0), (4.0, 30.0))
    x = embed(grid, np.arange(6))
    np.testing.assert_allclose(doses.decode(x), grid.decode(np.arange(6)), rtol=1e-6)
    assert np.array_equal(action_table(lesson(0.5, 5)[2].action_spec), np.eye(4, dtype=np.float32))


# ---- the guard


@given(st.floats(0, 50), st.floats(0.01, 10), st.floats(0, 0.99))
def test_guard_charges_beyond_a_share_of_the_radius(d, radius, theta):
    g = float(guard(torch.tensor(d, dtype=torch.float64), torch.tensor(radius, dtype=torch.float64), theta))
    assert math.isclose(g, max(d - theta * radius, 0) / radius, rel_tol=1e-9, abs_tol=1e-12)


def test_q_feels_the_guard():
    "p = 1/4 each, g = (0, 0, 0, 1): the gradient is p (g - 1/4)."
    stays = lesson(0.25, 50)[2]
    learner = Guarded(Replay.of(stays), None, GCQL(hidden=(), alpha=0.0, beta=1.0), [0], support_of(stays))
    with torch.no_grad():
        for p in learner.policy.parameters(): p.zero_()
    nothing = torch.zeros(1, 1)
    told = learner.losses({"obs": torch.zeros(1, 1, 11), "next_obs": torch.zeros(1, 1, 11), "action": nothing.long(),
                           "reward": nothing, "keeps": nothing, "guard": torch.tensor([[[0.0, 0, 0, 1]]])})
    told["loss"].sum().backward()
    wanted = torch.tensor([-0.0625, -0.0625, -0.0625, 0.1875])
    torch.testing.assert_close(learner.policy.net.bias[0].grad.flatten(), wanted)


@BOTH
def test_without_prices_it_is_cql(kind):
    config = GCQL(**QUICK, guard=kind, beta=0.0, kappa=0.0, select="validation")
    free = cql.train(TOY, cql.CQL(**QUICK), seed=[1, 2], progress=False)
    none = gcql.train(TOY, replace(config, select="last"), seed=[1, 2], progress=False)
    assert same(free.policy, none.policy) and type(none.policy) is StackedPolicy
    common = list(free.history)
    assert free.history.equals(none.history[common])
    priced = gcql.train(TOY, replace(config, beta=1.0, select="last"), seed=[1, 2], progress=False)
    assert not same(free.policy, priced.policy)


@BOTH
def test_guard_of_the_rows_is_the_guard_of_their_states(kind):
    many = [TOY.select(range(25)), TOY.select(range(25, 60))]
    support = support_of(many, SupportConfig(kind=kind))
    rows = GuardedReplay.around(Replay.of(many), support).batch(torch.tensor([1, 2]), 0, 16)
    torch.testing.assert_close(rows["guard"], support.guard(support.distances(rows["obs"])))
    one = support_of(TOY, SupportConfig(kind=kind))
    rows = GuardedReplay.around(Replay.of(TOY, k=3), one).batch(torch.tensor([1, 2, 3]), 0, 16)
    torch.testing.assert_close(rows["guard"][2:], one.guard(one.distances(rows["obs"][2:])))


@BOTH
def test_stacked_is_alone(kind):
    config = GCQL(**QUICK, guard=kind)
    three, alone = (gcql.train(TOY, config, seed=s, progress=False).policy for s in ([4, 5, 6], [5]))
    for a, b in zip(alone.parameters(), three.member(1).parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    many = [TOY.select(range(25)), TOY.select(range(25, 60))]
    both = gcql.train(many, config, seed=[1, 2], progress=False).policy
    mine = gcql.train(many[1], config, seed=[2], progress=False).policy
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mine.act(x, deterministic=True), both.member(1).act(x, deterministic=True))
    assert torch.equal(both.act(x.repeat(2, 1), deterministic=True)[8:], both.member(1).act(x, deterministic=True))


def test_resumed_is_uninterrupted(tmp_path):
    class Stop(Exception): pass

    def stop(row, step):
        if step == 30: raise Stop

    config, how = GCQL(**QUICK, select="validation"), dict(seed=[1, 2], progress=False, checkpoint=tmp_path / "run")
    with pytest.raises(Stop): gcql.train(TOY, config, log=stop, **how)
    with pytest.raises(ValueError, match="another run"): gcql.train(TOY, replace(config, theta=0.4), **how)
    resumed, whole = gcql.train(TOY, config, **how), gcql.train(TOY, config, seed=[1, 2], progress=False)
    assert same(resumed.policy, whole.policy) and resumed.history.equals(whole.history)
    assert torch.equal(resumed.policy.support.state, whole.policy.support.state)


def test_held_out_loss_has_the_guard():
    config = GCQL(**QUICK)
    support = support_of(TOY, config.support())
    learner = Guarded(Replay.of(TOY), Replay.of(TOY, fold="val"), config, [0], support)
    seen = look(learner)
    assert seen["val_guard"] >= 0 and torch.isfinite(seen["val_score"]).all()


def test_a_known_best_action_is_found():
    "Most clinicians are wrong; all that they do is supported (the other learners: test_offline)."
    ward, _, stays = lesson(0.15, 2_000)
    more = dict(alpha=0.1, tau=0.02, guard="neighbour")
    config = GCQL(**{**QUICK, "steps": 400, "batch": 128, "hidden": (32,)}, **more)
    policy = gcql.train(stays, config, seed=[0, 1], progress=False).policy
    chosen = policy.act(torch.eye(11)[:8].repeat(2, 1), deterministic=True).view(2, 8)
    assert (chosen == torch.arange(8) % 4).all()
    assert np.isclose(ward.evaluate(np.append(chosen[0], [0, 0, 0])).value, 0.9)


# ---- policies


def fond(k: int = 2) -> StackedPolicy:
    "Policies that think most of action 3, then of 2."
    policy = StackedPolicy(PolicyConfig(11, Actions(True, 4), (8,), rule="greedy"), list(range(k)))
    with torch.no_grad(): policy.net.bias[-1].add_(torch.tensor([0.0, 1.0, 2.0, 9.0]))
    return policy


def never_three() -> Episodes:
    stays = lesson(0.25, 400)[2]
    return stays.select(~((stays.action == 3) & stays.mask).any(1))


class Habit:
    "Clinicians who never give action 3."

    def probs(self, obs): return torch.tensor([0.5, 0.2, 0.3, 0.0]).expand(len(obs), 4)


CONFINED = [lambda p: GuardedPolicy.around(p, support_of(never_three())),
            lambda p: GuardedPolicy.around(p, support_of(never_three()), 100.0),
            lambda p: LikelyPolicy.around(p, Habit())]


@pytest.mark.parametrize("confine", CONFINED, ids=["guarded", "priced", "likely"])
def test_confined_policies_do_without_the_unsupported(confine):
    x = torch.eye(11)[:8].repeat(2, 1)
    policy: Confined = confine(fond())
    assert (fond().act(x, deterministic=True) == 3).all() and (policy.act(x, deterministic=True) == 2).all()
    assert (policy.act(x, generator=torch.Generator().manual_seed(0)) == 2).all()
    p = policy.probs(x)
    torch.testing.assert_close(p.sum(-1), torch.ones(16))
    torch.testing.assert_close(policy.log_prob(x, torch.full((16,), 2)), torch.zeros(16))
    assert (policy.log_prob(x, torch.full((16,), 3)) == -torch.inf).all()
    assert torch.equal(policy.member(1).probs(x[8:]), p[8:]) and policy.member(1).k == 1
    assert same(policy.plain(), fond())


def test_soft_policies_are_confined_too():
    soft = StackedPolicy(PolicyConfig(11, Actions(True, 4), (8,)), [0])
    p = GuardedPolicy.around(soft, support_of(never_three())).probs(torch.eye(11)[:8])
    assert (p[:, 3] == 0).all() and (p[:, :3] > 0).all()


def test_where_nothing_is_supported_the_nearest_is_chosen():
    support = support_of(TOY)
    policy = GuardedPolicy.around(StackedPolicy(PolicyConfig(2, Actions(True, 25), (8,), rule="greedy"), [0]), support)
    x = torch.full((3, 2), 40.0)
    assert torch.equal(policy.act(x, deterministic=True), support.distances(x[None]).argmin(-1)[0])


def test_least_probability():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.34, 0.33, 0.33]])
    assert likely(p, 0.3).tolist() == [[True, True, False], [True] * 3]
    assert likely(p, 0.5).tolist() == [[True, False, False], [True, False, False]]


def narrow(seed: int, n: int = 150) -> Episodes:
    "One drug of 25 levels; clinicians give 10 to 14. The reward grows with the dose they never give."
    rng = np.random.default_rng(seed)
    e, levels = Episodes.example(n, 4, seed), tuple(range(25))
    level = rng.integers(10, 15, (n, 4))
    spec = Treatments(("drug",), ("mg",), (0.0,), (24.0,), (levels,))
    obs = rng.uniform(-1, 1, (n, 5, 2)).astype(np.float32)
    return replace(e, obs=obs[:, :-1], final_obs=obs[:, -1], action=level, action_spec=spec,
                   reward=e.mask * (0.05 * level - 1.5), ids=e.ids.assign(fold="train"))


def test_narrow_data_order_the_learners():
    "Distance of what each would do in fresh states: GCQL < CQL < DQN, for every seed."
    more = dict(steps=300, batch=64, rate=3e-3, hidden=(32,), tau=0.05, validate_every=100)
    kinds = {"dqn": (dqn, dqn.DQN(**more)), "cql": (cql, cql.CQL(**more, alpha=0.002)),
             "gcql": (gcql, GCQL(**more, alpha=0.002, beta=0.002, guard="neighbour", theta=0.3))}
    many, far = [narrow(s) for s in range(4)], {}
    support, x = support_of(many), torch.rand(4, 50, 2, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    for name, (room, config) in kinds.items():
        policy = room.train(many, config, seed=[0, 1, 2, 3], progress=False).policy
        chosen = policy.act(x.flatten(0, 1), deterministic=True).view(4, 50)
        far[name] = support.distance(x, chosen).mean(-1)
    print({n: d.numpy().round(3) for n, d in far.items()})
    assert (far["gcql"] < 0.95 * far["cql"]).all() and (far["cql"] < 0.8 * far["dqn"]).all()


# ---- curves


def test_curves_of_a_policy_like_the_behaviour():
    many = [narrow(s) for s in range(2)]
    wide = [replace(e, action=np.random.default_rng(i).integers(0, 25, e.action.shape)) for i, e in enumerate(many)]
    curves = support_curves(many, {"wide": wide, "again": [narrow(s + 9) for s in range(2)]})
    table = support_table(curves)
    assert 4 < table["beyond 95 %"]["behaviour"] < 6 and table["beyond 95 %"]["again"] < 15
    assert table["beyond 95 %"]["wide"] > 50 and list(table.index) == ["behaviour", "wide", "again"]
    query = [halves(e)[1] for e in many]
    assert len(curves["behaviour"]) == sum(e.mask.sum() for e in query)


# ---- what cannot be


@pytest.mark.parametrize(("wrong", "said"), [
    ({"kind": "ball"}, "kind"), ({"by": "ward"}, "by="), ({"share": 1.0}, "share"), ({"nearest": 0}, "nearest"),
    ({"nearest": 5, "most": 4}, "nearest"), ({"theta": -0.1}, "theta"), ({"floor": 0.0}, "floor"),
])
def test_bad_settings_of_a_support(wrong, said):
    with pytest.raises(ValueError, match=said): SupportConfig(**wrong)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"guard": "wall"}, "guard"), ({"beta": -1.0}, "beta"), ({"kappa": math.nan}, "kappa"), ({"theta": 1.0}, "theta"),
    ({"reference": 0}, "reference"), ({"nearest": 0}, "nearest"), ({"share": 0.0}, "share"), ({"alpha": -1.0}, "alpha"),
])
def test_bad_settings_of_gcql(wrong, said):
    with pytest.raises(ValueError, match=said): GCQL(**wrong)


def test_what_does_not_fit_is_refused():
    support, doses = support_of(never_three()), at([0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4])
    cases = [
        (lambda: action_table(Continuous()), "doses"), (lambda: support_of(TOY.select([0])), "fold|alone"),
        (lambda: support_of(TOY, SupportConfig(nearest=900, most=1_000)), "nearest=900"),
        (lambda: support_of(TOY, fold="exam"), "exam"),
        (lambda: support_of(doses).distances(torch.zeros(1, 1, 2)), "doses"),
        (lambda: support_of([TOY, Episodes.example(90)]), "episodes 1"), (lambda: support.member(1), "no data set 1"),
        (lambda: support.distances(torch.zeros(1, 1, 3)), "11 features, not 3"),
        (lambda: GuardedPolicy.around(fond(), support, -1.0), "kappa"), (lambda: fond().member(5), "no policy 5"),
        (lambda: GuardedPolicy(PolicyConfig(11, Actions(True, 5)), [0], support), "support: of"),
        (lambda: GuardedPolicy(PolicyConfig(2, Actions(True, 25)), [0, 1, 2], support_of([TOY, TOY])), "2 data sets"),
        (lambda: LikelyPolicy.around(fond(), Habit(), 1.0), "least"),
        (lambda: gcql.train(doses, GCQL(**QUICK)), "doses"),
        (lambda: support_curves([TOY, TOY], {"other": TOY}), "other: 1 data sets"),
    ]
    for wrong, said in cases:
        with pytest.raises(ValueError, match=said): wrong()
