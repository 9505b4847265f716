"Rewards: published numbers, NaN pays nothing, padding pays nothing."

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsim.data.rewards import (
    RaghuReward,
    SofaShapedReward,
    SurvivalReward,
    TerminalReward,
    VentilationReward,
)

ALL = (TerminalReward(), SurvivalReward(), SofaShapedReward(), RaghuReward(), VentilationReward())


def stays(seed: int, n: int = 6, t: int = 8, missing: float = 0.3):
    "Random stays with missing values: now, after, died, last."
    rng = np.random.default_rng(seed)
    low, high = {"sofa": 0, "lactate": 1, "spo2": 88, "map": 50}, {"sofa": 24, "lactate": 9, "spo2": 100, "map": 100}
    sides = []
    for _ in range(2):
        values = {k: rng.integers(low[k], high[k] + 1, (n, t)).astype(float) for k in low}
        sides.append({k: np.where(rng.random((n, t)) < missing, np.nan, v) for k, v in values.items()})
    last = np.zeros((n, t), bool)
    last[np.arange(n), rng.integers(0, t, n)] = True
    return *sides, rng.random(n) < 0.5, last


@pytest.mark.parametrize("reward", ALL, ids=lambda r: type(r).__name__)
@given(seed=st.integers(0, 10_000))
def test_every_reward_is_finite_and_zero_after_the_last_step(reward, seed):
    now, after, died, last = stays(seed)
    r = reward(now, after, died, last)
    assert r.shape == last.shape and r.dtype == np.float32 and np.isfinite(r).all()
    padding = np.cumsum(last, 1) - last > 0
    assert (r[padding] == 0).all()


@pytest.mark.parametrize("reward", ALL, ids=lambda r: type(r).__name__)
def test_only_a_reward_that_pays_the_outcome_depends_on_it(reward):
    now, after, died, last = stays(0)
    difference = reward(now, after, died, last) != reward(now, after, ~died, last)
    assert (difference == (last & reward.pays_outcome)).all()


@pytest.mark.parametrize("reward", ALL, ids=lambda r: type(r).__name__)
def test_needs_are_what_is_read(reward):
    now, after, died, last = stays(1)
    only = ({k: x[k] for k in reward.needs} for x in (now, after))
    assert (reward(*only, died, last) == reward(now, after, died, last)).all()
    for name in reward.needs:
        with pytest.raises(ValueError, match=f"{type(reward).__name__} needs now.*{name}"):
            reward({k: v for k, v in now.items() if k != name}, after, died, last)


@pytest.mark.parametrize("reward", ALL, ids=lambda r: type(r).__name__)
def test_all_missing_pays_the_outcome_alone(reward):
    now, after, died, last = stays(2, missing=1.0)
    paid = reward(now, after, died, last) != 0
    assert (paid <= last).all()


@given(seed=st.integers(0, 10_000))
def test_sofa_shaping_telescopes(seed):
    score = np.random.default_rng(seed).integers(0, 25, (4, 9)).astype(float)
    last = np.zeros((4, 8), bool)
    last[:, -1] = True
    died = np.zeros(4, bool)
    r = SofaShapedReward()({"sofa": score[:, :-1]}, {"sofa": score[:, 1:]}, died, last)
    assert np.allclose(r.sum(1), 15 - 0.025 * (score[:, -1] - score[:, 0]), atol=1e-5)


@pytest.mark.parametrize(
    "sofa, lactate, expected",
    [
        ((6, 6), (2, 2), -0.025),
        ((0, 0), (2, 2), 0),
        ((6, 9), (2, 2), -0.375),
        ((6, 6), (2, 4), -0.025 - 2 * np.tanh(2)),
        ((np.nan, 6), (2, 1), 2 * np.tanh(1)),
        ((6, np.nan), (np.nan, 1), 0),
    ],
)
def test_raghu_by_hand(sofa, lactate, expected):
    now, after = ({"sofa": np.array([[sofa[k], 0.0]]), "lactate": np.array([[lactate[k], 1.0]])} for k in (0, 1))
    last = np.array([[False, True]])
    assert np.isclose(RaghuReward()(now, after, np.array([False]), last)[0, 0], expected, atol=1e-6)


def test_ventilation_bounds_are_inside():
    after = {"spo2": np.array([[94, 98, 93.9, 98.1, np.nan]]), "map": np.array([[70, 80, 69.9, 80.1, np.nan]])}
    last = np.array([[False, False, False, False, True]])
    assert VentilationReward()(after, after, np.array([True]), last).tolist() == [[2, 2, -1, -1, 0]]


def test_unknown_outcomes_and_two_last_steps_are_refused():
    now, after, died, last = stays(3)
    with pytest.raises(ValueError, match="outcome is unknown"):
        TerminalReward()(now, after, died.astype(float), last)
    last[2] = True
    with pytest.raises(ValueError, match="episode 2"):
        TerminalReward()(now, after, died, last)


def test_rewards_describe_themselves_in_json():
    assert json.loads(json.dumps(SofaShapedReward(weight=0.1).to_dict())) == {
        "kind": "SofaShapedReward", "size": 15.0, "weight": 0.1,
    }
