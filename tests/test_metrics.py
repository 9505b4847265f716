"Metrics of courses: integrals over the whole course, and comparisons between policies."

import numpy as np
import pandas as pd
import pytest
import torch

from medsim.bench.metrics import Constant, by_patient, follow, improvement, win_rate
from medsim.envs.registration import glucose, sepsis
from medsim.envs.rollout import uniform_policy
from medsim.envs.vector import TreatmentVectorEnv

torch.set_num_threads(1)
PATIENTS = sepsis().select([0, 1, 2])
DOSE = (0.35, 0.6, 0.3)


def test_a_constant_dose_is_judged_alike_however_often_one_looks():
    "The course does not depend on the visits, so no metric but the number of decisions may either."
    often, seldom = (follow(TreatmentVectorEnv(PATIENTS, 2, budget=n), Constant(DOSE), seed=3) for n in (24, 4))
    for metric in ("severity", "severity_end", "safe", "reward"):
        np.testing.assert_allclose(often[metric], seldom[metric], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(often.safe_late, seldom.safe_late, atol=0.01)
    assert (often.decisions == 24).all() and (seldom.decisions == 4).all()
    assert (often.violated == seldom.violated).all()


def test_late_danger_against_the_environments_own():
    env = TreatmentVectorEnv(PATIENTS, 3, timing="adaptive", budget=6, backend="pinn")
    whole = follow(env, uniform_policy(env), deterministic=False, seed=1, late_h=0.0, step_h=0.05)
    np.testing.assert_allclose(whole.safe_late, whole.safe, atol=0.004)
    late = follow(env, uniform_policy(env), deterministic=False, seed=1, late_h=48.0, step_h=0.05)
    np.testing.assert_allclose(whole.safe, late.safe)  # looking changes nothing
    danger, after = 96 * (1 - late.safe), 48 * (1 - late.safe_late)
    assert (after <= danger + 0.3).all()


def test_same_seed_same_courses_and_more_episodes():
    env = TreatmentVectorEnv(PATIENTS, 2, budget=5, backend="pinn")
    a, b = (follow(env, uniform_policy(env), deterministic=False, seed=7, episodes=2) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)
    assert len(a) == 12 and a.groupby("patient").size().eq(4).all()
    one = follow(env, uniform_policy(env), deterministic=False, seed=7)
    pd.testing.assert_frame_equal(a[a.episode == 0].reset_index(drop=True), one)


def test_other_conditions():
    env = TreatmentVectorEnv(glucose(4), 2, budget=12)
    c = follow(env, uniform_policy(env), deterministic=False, late_h=6.0)
    assert c.safe.between(0, 1).all() and c.severity.ge(0).all() and (c.decisions == 12).all()


def test_comparisons():
    base = pd.DataFrame({"patient": list("aabbc"), "severity": [10.0, 12, 6, 6, 4]})
    other = pd.DataFrame({"patient": list("abccc"), "severity": [9.0, 6, 5, 5, 5]})
    assert by_patient(base).to_dict() == {"a": 11, "b": 6, "c": 4}
    assert improvement(base, other).value == pytest.approx(100 * (21 - 20) / 21)
    assert win_rate(base, other).value == pytest.approx(0.5)  # a better, b the same, c worse
    both = improvement(base, other)
    assert both.low <= both.value <= both.high and both.n == 3


def test_faults():
    env = TreatmentVectorEnv(PATIENTS, 1, budget=5, backend="pinn")
    with pytest.raises(ValueError, match="late_h=96"): follow(env, uniform_policy(env), late_h=96.0)
    courses = pd.DataFrame({"patient": [0, 1], "severity": [1.0, 2.0]})
    with pytest.raises(ValueError, match="metric='sofa': there are patient, severity"): by_patient(courses, "sofa")
    with pytest.raises(ValueError, match="2 and 1 patients, 1 in both"): improvement(courses, courses[:1])


def test_a_constant_actor():
    c = Constant(DOSE)
    a = c.act(torch.zeros(4, 8))
    assert a.shape == (4, 3) and (c.log_prob(torch.zeros(4, 8), a) == 0).all()
    assert (c.log_prob(torch.zeros(4, 8), a + 0.1) == -torch.inf).all()
