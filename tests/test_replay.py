"Logged steps for K learners: which rows, which discounts, which draws."

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.agents.replay import Replay, described, lesson, rows_of
from medsim.data.actions import Continuous
from medsim.data.episodes import Episodes

torch.set_num_threads(1)
TOY = Episodes.example(80)


def test_rows_are_those_of_the_fold():
    rows, steps = rows_of(TOY, "val", 0.9, "step"), TOY.transitions("val")
    for name in ("obs", "action", "reward", "next_obs", "episode"):
        np.testing.assert_array_equal(rows[name], steps[name])
    np.testing.assert_allclose(rows["keeps"], np.where(steps["terminated"], 0, 0.9), rtol=1e-6)


def test_hours_discount_by_the_interval_and_cuts_keep_their_future():
    dt = np.where(TOY.mask, np.random.default_rng(0).choice([1.0, 4.0, 12.0], TOY.mask.shape), 0)
    cut = replace(TOY, dt=dt, terminated=TOY.truncated, truncated=TOY.terminated)
    replay = Replay.of(cut, gamma=0.9, per="hour")
    np.testing.assert_allclose(replay.keeps, 0.9 ** cut.transitions("train")["dt"].astype(float), rtol=1e-5)


def test_several_data_sets_and_one_for_all():
    many = [Episodes.example(30, seed=s) for s in range(3)]
    three = Replay.of(many)
    assert three.k == 3 and three.start.tolist() == [0, *np.cumsum(three.size.tolist())[:-1]]
    for k, e in enumerate(many):
        own = Replay.of(e)
        rows = slice(int(three.start[k]), int(three.start[k] + three.size[k]))
        assert torch.equal(three.obs[rows], own.obs) and torch.equal(three.action[rows], own.action)
    shared = Replay.of(TOY, k=4)
    assert shared.start.tolist() == [0] * 4 and len(set(shared.size.tolist())) == 1


@settings(max_examples=10, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**62), min_size=2, max_size=4), step=st.integers(0, 10**6),
       size=st.integers(1, 40))
def test_a_policy_draws_alone_what_it_draws_among_others(seeds, step, size):
    many = [Episodes.example(12 + 3 * i, seed=i) for i in range(len(seeds))]
    keys = torch.tensor(seeds)
    together = Replay.of(many).batch(keys, step, size)
    k = len(seeds) - 1
    alone = Replay.of(many[k]).batch(keys[k:], step, size)
    for name in alone: assert torch.equal(together[name][k], alone[name][0])


def test_draws_are_uniform_and_differ_by_step():
    replay = Replay.of(TOY)
    replay = replace(replay, reward=torch.arange(len(replay.reward)).float())
    key = torch.tensor([3])
    drawn = torch.cat([replay.batch(key, step, 500)["reward"][0] for step in range(80)]).long()
    times = torch.bincount(drawn, minlength=len(replay.reward)).double()
    assert times.min() > 0 and abs(times.var() / times.mean() - 1) < 0.3


@pytest.mark.parametrize("most", [5, 150, 10_000])
def test_held_out_rows_do_not_depend_on_the_others(most):
    many = [Episodes.example(n, seed=n) for n in (15, 90)]
    together = Replay.of(many).spread(most)
    for k, e in enumerate(many):
        alone = Replay.of(e).spread(most)
        n = int(alone["weight"].sum())
        assert n == min(most, int(Replay.of(e).size[0])) == int(together["weight"][k].sum())
        assert torch.equal(together["obs"][k, :n], alone["obs"][0, :n])


def doses(e: Episodes) -> Episodes:
    return replace(e, action=np.zeros((*e.mask.shape, 3), np.float32), action_spec=Continuous())


def test_doses():
    replay = Replay.of(doses(TOY))
    assert replay.action.shape == (len(replay.reward), 3) and replay.action.dtype == torch.float32
    assert replay.actions.low == (0.0,) * 3 and not replay.actions.discrete


def test_refusals():
    one_feature = lesson(0.5, 20)[2]
    for many, message in (([TOY, doses(TOY)], "episodes 1: doses and action ids"), ([], "no episodes"),
                          ([TOY, one_feature], "episodes 1: 4 actions, but the first has 25")):
        with pytest.raises(ValueError, match=message): Replay.of(many)
    renamed = replace(TOY, feature_names=("map", "ph"), units={"map": "mmHg", "ph": "1"},
                      normaliser=replace(TOY.normaliser, names=("map", "ph")))
    with pytest.raises(ValueError, match="episodes 1: features differ.* lactate, ph"): Replay.of([TOY, renamed])
    with pytest.raises(ValueError, match="no episode is in fold 'test'"):
        Replay.of(TOY.select(TOY.ids.fold != "test"), fold="test")
    with pytest.raises(ValueError, match="k=3: 2 data sets"): Replay.of([TOY, TOY], k=3)
    torn = replace(TOY, ids=TOY.ids.assign(subject_id=0))
    with pytest.raises(ValueError, match="1 subjects are in two folds"): Replay.of(torn)
    with pytest.raises(ValueError, match="must be 'state'"): described(TOY, np.eye(2))


def test_marks_tell_data_apart():
    assert Replay.of(TOY).mark() == Replay.of(TOY).mark() != Replay.of(replace(TOY, reward=TOY.reward + 1)).mark()
    assert Replay.of(TOY).mark() != Replay.of(TOY, gamma=0.5).mark()


def test_described_states():
    ward, _, stays = lesson(0.5, 40)
    assert stays.obs.shape[-1] == 11 and (stays.obs[stays.mask].sum(-1) == 1).all()
    assert (stays.final_obs.argmax(1) >= 8).all() and ward.terminal[stays.final_obs.argmax(1)].all()
