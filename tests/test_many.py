"Policies in chunks and processes: the same policies, kept, and a dead worker replaced."

import os
import signal
from pathlib import Path

import joblib
import pytest
import torch

from medsim.agents import ppo, sac
from medsim.agents.many import chunks, joined, train_many
from medsim.agents.onpolicy import Diverged
from medsim.agents.ward import IdentityWard

torch.set_num_threads(1)
QUICK = ppo.PPO(steps=256, rollout=128, hidden=(4,), epochs=1)
SOFT = sac.SAC(steps=256, rollout=128, buffer=256, warmup=128, batch=8, updates=0.1, hidden=(4,))


def identity(ids): return IdentityWard(policies=len(ids), copies=8)


def close(a, b):
    for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (5, 2), (110, 16), (16, 16), (17, 16)])
def test_chunks_cover_everyone_once(n, size):
    parts = [list(c) for c in chunks(n, size)]
    assert sum(parts, []) == list(range(n)) and max(map(len, parts)) <= size
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("train", "config"), [(ppo.train, QUICK), (sac.train, SOFT)])
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_chunks_are_one_stack(train, config, n_jobs):
    spread = train_many(identity, list("abcde"), train, config, seed=3, chunk=2, n_jobs=n_jobs, progress=False)
    whole = train(identity("abcde"), config, seed=3, progress=False)
    close(spread, whole)
    assert spread.history.groupby("policy").step.max().to_dict() == dict.fromkeys("abcde", 256)
    assert spread.seeds == whole.seeds


class Deadly(IdentityWard):
    "Kills its process once, when policy 2 of 4 is well under way."

    def __init__(self, ids, marker):
        super().__init__(policies=len(ids), copies=8)
        self.ids, self.marker, self.steps = ids, Path(marker), 0

    def step(self, action):
        self.steps += 1
        if 2 in self.ids and self.steps > 20 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def test_a_killed_worker_costs_a_retry(tmp_path):
    def make(ids): return Deadly(ids, tmp_path / "died")

    result = train_many(make, [0, 1, 2, 3], ppo.train, QUICK, seed=1, chunk=2, n_jobs=2, progress=False,
                        checkpoint=tmp_path / "runs")
    assert (tmp_path / "died").exists()
    close(result, ppo.train(identity([0, 1, 2, 3]), QUICK, seed=1, progress=False))


def test_errors_come_through(tmp_path):
    class Broken(IdentityWard):
        def step(self, action):
            e = super().step(action)
            return e._replace(reward=e.reward * torch.nan)

    with pytest.raises(Diverged, match="policy 0, step 0"):
        train_many(lambda ids: Broken(policies=len(ids), copies=8), [0, 1], ppo.train, QUICK, n_jobs=1, progress=False)
    with pytest.raises(ValueError, match="chunks of 0"):
        train_many(identity, [0, 1], ppo.train, QUICK, chunk=0, progress=False)
    with pytest.raises(ValueError, match="3 seeds for 2 policies"):
        train_many(identity, [0, 1], ppo.train, QUICK, seed=[1, 2, 3], progress=False)


def test_only_like_shapes_are_joined():
    a, b = (ppo.train(identity([0]), ppo.PPO(steps=128, rollout=128, hidden=(h,), epochs=1), progress=False).policy
            for h in (4, 5))
    with pytest.raises(ValueError, match="different shapes"): joined([a, b])


def test_another_backend_by_configuration():
    "What a cluster's backend does: nothing in the call changes."
    with joblib.parallel_config(backend="threading", n_jobs=2):
        result = train_many(identity, [0, 1, 2], ppo.train, QUICK, seed=2, chunk=1, n_jobs=None, progress=False)
    close(result, ppo.train(identity([0, 1, 2]), QUICK, seed=2, progress=False))


def test_a_dask_cluster_gives_the_same():
    distributed = pytest.importorskip("distributed", reason="the extra distributed is not installed")
    cluster_of = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with distributed.LocalCluster(**cluster_of) as cluster, \
            distributed.Client(cluster), joblib.parallel_config(backend="dask"):
        result = train_many(identity, [0, 1, 2, 3], ppo.train, QUICK, seed=2, chunk=2, n_jobs=-1, progress=False)
    close(result, ppo.train(identity([0, 1, 2, 3]), QUICK, seed=2, progress=False))
