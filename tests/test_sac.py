"SAC: targets by hand, K policies that are K policies, memory, and runs that resume."

import pytest
import torch

from medsim.agents.onpolicy import SHUFFLE, Diverged, check, run
from medsim.agents.sac import KEPT, SAC, Critics, SoftStudent, improve, learned, recalled, sampled, train
from medsim.agents.ward import GymWard, IdentityWard, PatientWard, seeds_of
from medsim.core.counter import derive
from medsim.core.nets import SquashedGaussian
from medsim.envs.registration import sepsis
from medsim.envs.vector import TreatmentVectorEnv

torch.set_num_threads(1)
QUICK = SAC(steps=480, rollout=160, buffer=320, warmup=160, batch=16, updates=0.25, rate=3e-3, tau=0.02, hidden=(8,))


def test_density_of_a_squashed_sample():
    student = SoftStudent(IdentityWard(policies=2, copies=4), QUICK, [1, 2])
    noise = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(0))
    u, log_p = sampled(student.policy, student.obs, noise)
    mean, log_std = student.policy.gaussian(student.obs)
    torch.testing.assert_close(log_p, SquashedGaussian(mean, log_std).log_prob(u), atol=1e-4, rtol=1e-4)


def test_copying_a_number():
    config = SAC(steps=2_000, rollout=160, buffer=4_000, warmup=160, batch=64, updates=0.4, rate=3e-3, tau=0.02,
                 hidden=(32,), reward_scale=10.0)
    result = train(IdentityWard(policies=2, copies=16), config, seed=0, progress=False)
    obs = torch.linspace(0.1, 0.9, 9)[:, None].repeat(2, 1)
    assert (result.policy.act(obs, deterministic=True) - obs).abs().max() < 0.15
    assert (result.history.groupby("policy")["return"].last() > -0.25).all()


def test_stacked_is_alone_and_seeds_repeat():
    both = train(IdentityWard(policies=3, copies=16), QUICK, seed=5, progress=False)
    again = train(IdentityWard(policies=3, copies=16), QUICK, seed=5, progress=False)
    for a, b in zip(both.policy.parameters(), again.policy.parameters(), strict=True): assert torch.equal(a, b)
    alone = train(IdentityWard(policies=1, copies=16), QUICK, seed=[seeds_of(5, 3)[2]], progress=False)
    for a, b in zip(alone.policy.parameters(), both.policy.member(2).parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("observation", ["full", "partial"])
def test_resumed_is_uninterrupted(tmp_path, observation):
    class Stop(Exception): pass

    def stop(row, step):
        if step >= 320: raise Stop

    def ward():
        env = TreatmentVectorEnv(sepsis().select([0, 1]), 4, budget=5, backend="pinn", observation=observation)
        return PatientWard(env)

    with pytest.raises(Stop): train(ward(), QUICK, seed=1, progress=False, checkpoint=tmp_path / "run", log=stop)
    # every=10 updates: nothing kept yet at 320 decisions; a run of its own that ends there is kept
    short = SAC(**{**QUICK.__dict__, "steps": 320})
    train(ward(), short, seed=1, progress=False, checkpoint=tmp_path / "short")
    with pytest.raises(ValueError, match="another run"):
        train(ward(), QUICK, seed=1, progress=False, checkpoint=tmp_path / "short")

    def student(): return SoftStudent(ward(), QUICK, seeds_of(1, 2))

    with pytest.raises(Stop):
        run(student(), learned, progress=False, checkpoint=tmp_path / "often", every=1, log=stop)
    resumed = run(student(), learned, progress=False, checkpoint=tmp_path / "often", every=1)
    whole = run(student(), learned, progress=False)
    for a, b in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True): assert torch.equal(a, b)
    assert resumed.history.equals(whole.history)


def test_memory_is_a_ring_and_ends_have_no_future():
    student = SoftStudent(IdentityWard(policies=2, copies=16), QUICK, [1, 2])
    for _ in range(3):
        student.practise()
        student.update += 1
    m = student.extra
    assert int(m["steps"][0]) == int(320 * QUICK.updates)
    assert ((m["discount"] == 0).float().mean() - 0.1).abs() < 1e-6  # every tenth step ends an episode
    assert (m["u"].abs() <= 1).all() and m["obs"].shape == (2, 320, 1)
    batch = recalled(student, 320, student.key)
    for k in range(2):
        kept = {tuple(round(float(m[x][k, i].flatten()[0]), 5) for x in KEPT) for i in range(320)}
        drawn = {tuple(round(float(batch[x][k, i].flatten()[0]), 5) for x in KEPT) for i in range(16)}
        assert drawn <= kept  # whole decisions, of the policy's own


def test_a_cut_episode_keeps_its_future():
    ward = GymWard("Pendulum-v1", policies=1, copies=2, gamma=0.9)
    student = SoftStudent(ward, SAC(steps=400, rollout=400, buffer=400, warmup=400, batch=4, hidden=(4,)), [0])
    student.practise()
    assert (student.extra["discount"] == 0.9).all()  # Pendulum only ever truncates


def test_target_by_hand():
    "With the slow critics at a constant and alpha at 0 the critics are pulled to r + discount * constant."
    student = SoftStudent(IdentityWard(policies=1, copies=16), QUICK, [3])
    student.practise()
    with torch.no_grad():
        for p in (*student.critic.slow.parameters(), *student.critic.net.parameters()): p.zero_()
        student.critic.slow.bias[-1].fill_(2.0)
        student.critic.log_alpha.fill_(-40.0)
    step = int(student.extra["steps"][0])
    b = recalled(student, 160, derive(student.key, SHUFFLE, step))
    expected = (b["reward"] + b["discount"] * 2.0).square().mean(-1)  # both critics at 0: the sum of two halves
    loss, _, alpha = improve(student, 160)
    torch.testing.assert_close(loss, expected)
    assert alpha < 1e-12


def test_slow_copies_follow():
    critic = Critics(3, (4,), "relu", [0], "cpu")
    with torch.no_grad():
        for p in critic.net.parameters(): p.fill_(1.0)
        for p in critic.slow.parameters(): p.fill_(0.0)
    critic.follow(0.25)
    assert all((p == 0.25).all() for p in critic.slow.parameters())


@pytest.mark.parametrize(("fields", "message"), [
    ({"steps": 0}, "steps=0"), ({"tau": 2.0}, "tau above 1"), ({"updates": 0}, "updates=0"), ({"warmup": -1}, "warmup"),
])
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message): SAC(**fields)


def test_bad_wards():
    with pytest.raises(ValueError, match="SAC chooses doses"): SoftStudent(IdentityWard(n=3), QUICK, [0])
    with pytest.raises(ValueError, match="multiples of the 7 rows"): SoftStudent(IdentityWard(copies=7), QUICK, [0])


def test_a_weight_that_is_no_number_is_named():
    "The two critics of K policies are a stack of 2 K: the name is still the policy's."
    student = SoftStudent(IdentityWard(policies=2, copies=16), QUICK, [1, 2])
    with torch.no_grad(): student.critic.net.weight[0][3] = torch.nan  # the second critic of the second policy
    with pytest.raises(Diverged, match="policy b, step 0: net.weight.0"): check(student, {}, ["a", "b"])


def test_a_loss_that_is_no_number_is_named():
    class Broken(IdentityWard):
        def step(self, action):
            e = super().step(action)
            reward = e.reward.clone()
            reward[1] = torch.nan
            return e._replace(reward=reward)

    with pytest.raises(Diverged, match="policy 1, step 160: critic_loss is not a finite number"):
        train(Broken(policies=2, copies=16), QUICK, seed=0, progress=False)
