"Offline agents: K policies that are K policies, runs that resume, a test fold never read, losses by hand, answers."

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medsim.agents import bc, cql, dqn, iql
from medsim.agents.many import train_many
from medsim.agents.offline import Learner, OfflineConfig, follow, look
from medsim.agents.onpolicy import Diverged
from medsim.agents.policy import Actions, PolicyConfig, StackedPolicy, load_policy
from medsim.agents.replay import Replay, lesson
from medsim.data.actions import Continuous
from medsim.data.episodes import Episodes

torch.set_num_threads(1)
QUICK: dict[str, Any] = dict(steps=40, batch=32, rate=3e-3, hidden=(16,), validate_every=10)
KINDS: dict[str, tuple[Any, Any, type[Learner]]] = {
    "bc": (bc, bc.BC, bc.Cloning), "dqn": (dqn, dqn.DQN, dqn.DoubleQ), "cql": (cql, cql.CQL, cql.Conservative),
    "iql": (iql, iql.IQL, iql.Implicit),
}
TOY = Episodes.example(60)


def dosed(n: int = 60, seed: int = 0) -> Episodes:
    "Doses at random; the reward is lost by the squared distance from 0.5 + 0.3 x."
    rng = np.random.default_rng(seed)
    e = Episodes.example(n, 5, seed)
    x = rng.uniform(-1, 1, (n, 6, 2)).astype(np.float32)
    dose = rng.uniform(0, 1, (n, 5, 3))
    return replace(e, obs=x[:, :-1], final_obs=x[:, -1], action=dose, action_spec=Continuous(),
                   reward=-((dose[..., 1] - 0.5 - 0.3 * x[:, :-1, 0]) ** 2))


CASES = [(name, TOY) for name in KINDS] + [("bc", dosed()), ("iql", dosed())]
BOTH = pytest.mark.parametrize(("name", "episodes"), CASES, ids=[*KINDS, "bc doses", "iql doses"])


def same(a: StackedPolicy, b: StackedPolicy) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def close(a: StackedPolicy, b: StackedPolicy) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True): torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-3)


@BOTH
@pytest.mark.parametrize("select", ["last", "validation"])
def test_stacked_is_alone(name, episodes, select):
    room, kind, _ = KINDS[name]
    config = kind(**QUICK, select=select)
    three = room.train(episodes, config, seed=[4, 5, 6], progress=False)
    alone = room.train(episodes, config, seed=[5], progress=False)
    close(alone.policy, three.policy.member(1))
    assert not torch.equal(three.policy.net.weight[0][0], three.policy.net.weight[0][1])
    columns = [c for c in three.history if c not in ("policy", "step", "val_agreement")]
    mine = three.history[three.history.policy == 1][columns].to_numpy()
    np.testing.assert_allclose(mine, alone.history[columns].to_numpy(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_patients_side_by_side_are_patients_alone(name):
    room, kind, _ = KINDS[name]
    many = [Episodes.example(n, seed=n) for n in (40, 60)]
    both = room.train(many, kind(**QUICK), seed=[1, 2], progress=False)
    for k in range(2):
        close(room.train(many[k], kind(**QUICK), seed=[k + 1], progress=False).policy, both.policy.member(k))


@BOTH
def test_resumed_is_uninterrupted(name, episodes, tmp_path):
    class Stop(Exception): pass

    def stop(row, step):
        if step == 30: raise Stop

    room, kind, _ = KINDS[name]
    config, how = kind(**QUICK, select="validation"), dict(seed=[1, 2], progress=False, checkpoint=tmp_path / "run")
    with pytest.raises(Stop): room.train(episodes, config, log=stop, **how)
    with pytest.raises(ValueError, match="other episodes"):
        room.train(replace(episodes, reward=episodes.reward + 1), config, **how)
    with pytest.raises(ValueError, match="another run"): room.train(episodes, replace(config, rate=1e-4), **how)
    resumed, whole = room.train(episodes, config, **how), room.train(episodes, config, seed=[1, 2], progress=False)
    assert same(resumed.policy, whole.policy) and resumed.history.equals(whole.history)
    finished = room.train(episodes, config, **how)  # nothing left to do; the selected weights all the same
    assert same(finished.policy, whole.policy)


@BOTH
def test_the_test_fold_is_never_read(name, episodes):
    room, kind, _ = KINDS[name]
    test = (episodes.ids.fold == "test").to_numpy()
    assert test.any()

    def poison(x, value): return np.where(test.reshape(-1, *[1] * (x.ndim - 1)), value, x).astype(x.dtype)

    bad = replace(episodes, obs=poison(episodes.obs, 1e30), final_obs=poison(episodes.final_obs, -1e30),
                  reward=poison(episodes.reward, 1e30), action=poison(episodes.action, 1), dt=poison(episodes.dt, 1e6))
    config = kind(**QUICK, select="validation", per="hour")
    clean, poisoned = (room.train(e, config, seed=[1, 2], progress=False) for e in (episodes, bad))
    assert same(clean.policy, poisoned.policy) and clean.history.equals(poisoned.history)


@pytest.mark.parametrize("name", KINDS)
def test_a_number_that_is_none_is_named(name):
    room, kind, learner = KINDS[name]
    student = learner(Replay.of(TOY, k=3), None, kind(**QUICK), [1, 2, 3])
    with torch.no_grad(): student.policy.net.weight[0][2] = torch.nan
    with pytest.raises(Diverged, match="policy 2, step 0: (loss|actor) is not a finite number"): student.practise()
    spoiled = replace(TOY, reward=np.where(TOY.mask, 3e38, 0))
    if name != "bc":
        with pytest.raises(Diverged, match="policy 0, step 0"):
            room.train(spoiled, kind(**QUICK), seed=[0], progress=False)


@pytest.mark.parametrize("name", KINDS)
def test_a_known_best_action_is_found(name):
    "Most clinicians are wrong, but for cloning, which can only follow them."
    room, kind, _ = KINDS[name]
    ward, _, stays = lesson(0.5 if name == "bc" else 0.15, 2_000)
    more = {"cql": dict(alpha=0.1, tau=0.02), "dqn": dict(tau=0.02), "iql": dict(beta=10.0, expectile=0.8, tau=0.02),
            "bc": {}}[name]
    config = kind(**{**QUICK, "steps": 400, "batch": 128, "hidden": (32,)}, **more)
    result = room.train(stays, config, seed=[0, 1], progress=False)
    chosen = result.policy.act(torch.eye(11)[:8].repeat(2, 1), deterministic=True).view(2, 8)
    assert (chosen == torch.arange(8) % 4).all()
    assert np.isclose(ward.evaluate(np.append(chosen[0], [0, 0, 0])).value, 0.9)


def test_the_best_dose_is_found():
    config = iql.IQL(steps=400, batch=128, rate=3e-3, hidden=(32,), validate_every=100, beta=100.0, expectile=0.8,
                     gamma=0.5, tau=0.02)
    policy = iql.train(dosed(400), config, progress=False).policy
    x = torch.stack([torch.linspace(-0.9, 0.9, 19), torch.zeros(19)], 1)
    assert (policy.act(x, deterministic=True)[:, 1] - 0.5 - 0.3 * x[:, 0]).abs().mean() < 0.1


def test_selected_weights_are_those_of_the_best_look():
    config = bc.BC(steps=200, batch=16, rate=3e-2, hidden=(32,), validate_every=10, select="validation")
    result = bc.train(TOY, config, seed=[0, 1], progress=False)
    learner = bc.Cloning(Replay.of(TOY, k=2), Replay.of(TOY, fold="val", k=2), config, [0, 1])
    learner.policy.load_state_dict(result.policy.state_dict())
    best = result.history.groupby("policy").val_score.max().to_numpy()
    np.testing.assert_allclose(look(learner)["val_score"], best, atol=1e-5)
    assert (result.history.groupby("policy").val_score.last() < best).any()


def test_without_held_out_stays_nothing_is_validated():
    few = TOY.select(TOY.ids.fold != "val")
    history = bc.train(few, bc.BC(**QUICK), progress=False).history
    assert not [c for c in history if c.startswith("val_")]
    with pytest.raises(ValueError, match="fold 'val'"):
        bc.train(few, bc.BC(**QUICK, select="validation"), progress=False)


def test_log_and_history(tmp_path: Path):
    rows: list[Any] = []
    note = lambda row, step: rows.append((step, row))  # noqa: E731
    result = cql.train(TOY, cql.CQL(**QUICK), seed=[0, 1], progress=False, log=note)
    assert len(rows) == 8 == len(result.history) and result.seeds == (0, 1)
    names = {"td", "price", "loss", "val_td_error", "val_max_q", "val_data_q", "val_log_likelihood", "val_agreement"}
    assert names <= set(result.history)
    cql.train(TOY, cql.CQL(**QUICK), progress=False, log=tmp_path / "log.jsonl")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_many_patients_in_chunks():
    data = {i: Episodes.example(30, seed=i) for i in range(3)}
    config = dqn.DQN(**QUICK)
    result = train_many(lambda ids: [data[i] for i in ids], [0, 1, 2], dqn.train, config, seed=[7, 8, 9],  # type: ignore
                        chunk=2, n_jobs=1, progress=False)
    whole = dqn.train(list(data.values()), config, seed=[7, 8, 9], progress=False)
    close(result.policy, whole.policy)
    assert result.history.policy.tolist().count(2) == 4


@pytest.mark.parametrize(("kind", "fields", "message"), [
    (OfflineConfig, {"rate": 0}, "rate=0"), (OfflineConfig, {"gamma": 1.1}, "gamma=1.1"),
    (OfflineConfig, {"select": "test"}, "select='test'"), (OfflineConfig, {"steps": 1_500}, "multiple"),
    (OfflineConfig, {"weight_decay": -1.0}, "weight_decay"), (bc.BC, {"margin": 0.5}, "margin"),
    (dqn.DQN, {"tau": 0.0}, "tau"), (dqn.DQN, {"error": "l1"}, "error='l1'"), (cql.CQL, {"alpha": -1.0}, "alpha"),
    (iql.IQL, {"expectile": 1.0}, "expectile"), (iql.IQL, {"beta": -1.0}, "beta"), (iql.IQL, {"most": 0.0}, "most"),
])
def test_bad_settings(kind, fields, message):
    with pytest.raises(ValueError, match=message): kind(**fields)


def test_bad_calls():
    for name in ("dqn", "cql"):
        with pytest.raises(ValueError, match="among action ids"):
            KINDS[name][0].train(dosed(), KINDS[name][1](**QUICK), progress=False)
    with pytest.raises(ValueError, match="3 seeds for 2 policies"):
        bc.train([TOY, TOY], bc.BC(**QUICK), seed=[1, 2, 3], progress=False)


# ---- losses by hand


def batch(action: list[int], reward: list[float], keeps: list[float]) -> dict[str, torch.Tensor]:
    n = len(action)
    return {"obs": torch.zeros(1, n, 11), "next_obs": torch.ones(1, n, 11), "action": torch.tensor([action]),
            "reward": torch.tensor([reward]), "keeps": torch.tensor([keeps]), "weight": torch.ones(1, n)}


def flat(name: str, q: list[float], **fields: Any) -> Any:
    "A learner whose networks say the same of every state."
    _, kind, learner = KINDS[name]
    made: Any = learner(Replay.of(lesson(0.25, 50)[2]), None, kind(hidden=(), **fields), [0])
    with torch.no_grad():
        for p in (*made.policy.parameters(), *(made.critic.parameters() if made.critic else ())): p.zero_()
        made.policy.net.bias[0].copy_(torch.tensor([q]))
    return made


def test_cross_entropy():
    told = flat("bc", [1.0, 0.0, -1e9, -1e9]).losses(batch([0, 0, 1, 0], [0.0] * 4, [0.0] * 4))
    assert abs(told["loss"] - (3 * 0.313262 + 1.313262) / 4) < 1e-5


def test_double_q_target_is_the_slow_value_of_the_fast_choice():
    learner = flat("dqn", [1.0, 3.0, -9.0, -9.0])
    with torch.no_grad(): learner.slow.bias[0].copy_(torch.tensor([[5.0, 2.0, 9.0, 9.0]]))
    b = batch([0, 0], [1.0, 1.0], [0.9**4, 0.0])
    torch.testing.assert_close(learner.values(b)[2], torch.tensor([[1 + 2 * 0.9**4, 1.0]]))
    assert abs(learner.losses(b)["loss"] - (2 * 0.9**4) ** 2 / 2) < 1e-5


def test_price():
    told = flat("cql", [0.0, 0.0, float(np.log(2)), -1e9]).losses(batch([0, 2], [0.0, float(np.log(2))], [0.0, 0.0]))
    assert abs(told["loss"] - 5 * (np.log(4) + np.log(2)) / 2) < 1e-4 and told["td"] < 1e-10


@pytest.mark.parametrize(("beta", "weight"), [(2.0, np.exp(2)), (5.0, 100.0)])
def test_expectile_and_weights(beta, weight):
    learner = flat("iql", [0.0] * 4, beta=beta)
    with torch.no_grad():
        learner.critic.v.bias[0].fill_(1.0)
        learner.critic.slow.bias[0].copy_(torch.tensor([[2.0] * 4, [3.0] * 4]))
    told = learner.losses(batch([0, 3], [1.0, 1.0], [0.5, 0.0]))
    answers = {"value": 0.7, "td": 2 * (1.5**2 + 1) / 2, "actor": weight * np.log(4), "weight": weight}
    for name, expected in answers.items():
        assert abs(told[name] - expected) < 1e-3, name


def test_gradients_stay_with_their_networks():
    learner = flat("iql", [0.0] * 4)
    told = learner.losses(batch([0, 3], [1.0, 1.0], [0.5, 0.0]))
    told["actor"].sum().backward(retain_graph=True)
    assert all(p.grad is None for p in learner.critic.parameters())
    told["td"].sum().backward(retain_graph=True)
    assert all(p.grad is None for p in learner.critic.v.parameters())


def test_slow_networks_follow_at_their_steps():
    learner = flat("dqn", [4.0] * 4, tau=0.25, target_every=3)
    for step, expected in ((0, 0.0), (1, 0.0), (2, 1.0)):
        learner.settle(step)
        assert (learner.slow.bias[0] == expected).all()
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    follow(a, b, 1.0)
    assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("name", ["dqn", "cql"])
def test_slow_values_worked_out_once_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    room, kind, _ = KINDS[name]
    config = kind(**{**QUICK, "batch": 256}, tau=1.0, target_every=15)
    calls: list[int] = []
    asked = dqn.DoubleQ.after

    def counted(self: Any, b: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(self.told is not None)
        return asked(self, b)

    monkeypatch.setattr(dqn.DoubleQ, "after", counted)
    once = room.train(TOY, config, seed=[0, 1], progress=False)
    assert sum(calls) >= 30  # of 40 gradient steps, but for the first after each move
    monkeypatch.setattr(dqn, "MOST_KEPT", 0)
    each = room.train(TOY, config, seed=[0, 1], progress=False)
    close(once.policy, each.policy)


def test_an_infinite_norm_leaves_gradients_as_they_are():
    free, wide, tight = (dqn.train(TOY, dqn.DQN(**QUICK, max_grad_norm=m), progress=False) for m in (np.inf, 1e9, 1e-6))
    close(free.policy, wide.policy)
    assert not torch.allclose(free.policy.net.weight[0], tight.policy.net.weight[0], atol=1e-4)


def test_preset():
    c = iql.conservative_safe(hidden=(64,))
    assert (c.steps, c.actor_rate, c.rate, c.expectile, c.beta, c.most) == (110_000, 5e-5, 1e-4, 0.6, 2.0, 100.0)
    assert (c.gamma, c.batch, c.max_grad_norm, c.hidden) == (0.99, 256, 10.0, (64,))


# ---- greedy policies


def test_greedy_policies(tmp_path: Path):
    greedy = StackedPolicy(PolicyConfig(1, Actions(True, 3), hidden=(), rule="greedy"), [0, 1])
    with torch.no_grad():
        greedy.net.weight[0].zero_()
        greedy.net.bias[0].copy_(torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]]))
    obs = torch.zeros(2, 1)
    torch.testing.assert_close(greedy.probs(obs), torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]))
    assert greedy.log_prob(obs, torch.tensor([0, 1])).tolist() == [-np.inf, -np.inf]
    assert abs(greedy.log_prob(obs, torch.tensor([1, 0]))[0] - np.log(0.5)) < 1e-6
    drawn = greedy.act(torch.zeros(4_000, 1), generator=torch.Generator().manual_seed(0)).view(2, -1)
    assert abs((drawn[0] == 2).float().mean() - 0.5) < 0.05 and (drawn[0] > 0).all() and (drawn[1] == 0).all()
    greedy.save(tmp_path / "p")
    again = load_policy(tmp_path / "p")
    assert again.config.rule == "greedy" and torch.equal(again.probs(obs), greedy.probs(obs))


def test_policies_saved_before_there_was_a_rule_still_load(tmp_path: Path):
    policy = StackedPolicy(PolicyConfig(4, Actions(True, 3), (8,)), [0])
    policy.save(tmp_path / "p")
    file = tmp_path / "p" / "config.json"
    text = file.read_text()
    assert '"rule": "softmax"' in text
    head, _, tail = text.partition(',\n  "rule": "softmax"')
    file.write_text(head + tail)
    again = load_policy(tmp_path / "p")
    obs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert again.config.rule == "softmax" and torch.equal(again.probs(obs), policy.probs(obs))


def test_rules_that_do_not_fit():
    with pytest.raises(ValueError, match="rule='largest'"):
        PolicyConfig(1, Actions(True, 3), rule="largest")  # type: ignore[arg-type]
    doses = Actions(False, 1, (0.0,), (1.0,))
    with pytest.raises(ValueError, match="needs discrete"): PolicyConfig(1, doses, rule="greedy")
    with pytest.raises(ValueError, match="gives doses"):
        StackedPolicy(PolicyConfig(1, doses), [0]).probs(torch.zeros(1, 1))
