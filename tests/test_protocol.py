"Tables of runs: cells by name, kept, resumed, never mixed."

import json
import os
import signal
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

from medsim.agents import ppo, sac
from medsim.agents.onpolicy import Student
from medsim.agents.policy import load_policy
from medsim.bench.protocol import METHODS, Cell, Study, grid, run_cell, run_table, trace_cell
from medsim.envs.registration import sepsis
from medsim.sim.condition import Septic

torch.set_num_threads(1)
PATIENTS = sepsis().select([0, 1])
LITTLE = Study({"PPO": ppo.PPO(steps=256, rollout=64, epochs=1, hidden=(8,))}, courses=2)


def test_grid():
    cells = grid(budgets=(5, 10), seeds=(0, 1))
    assert len(cells) == len(METHODS) * 2 * 2 * 2 * 2 and len({c.name for c in cells}) == len(cells)


@pytest.mark.parametrize(("fields", "message"), [
    ({"method": "DQN"}, "method='DQN'"), ({"timing": "random"}, "timing='random'"),
    ({"model": "mean"}, "model='mean'"), ({"budget": 0}, "budget=0"),
])
def test_unknown_cells(fields, message):
    with pytest.raises(ValueError, match=message): Cell(**{"method": "PPO", **fields})


def test_settings_of_another_method():
    with pytest.raises(ValueError, match=r"settings\['PPO'\]: needs a PPO, not SAC"):
        Study({"PPO": sac.SAC()}).config("PPO")


def test_a_table_is_kept_and_grows(tmp_path):
    few = run_table(grid(["PPO"], timings=["fixed"], budgets=[5]), PATIENTS, LITTLE, tmp_path, progress=False)
    stamp = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    more = run_table(grid(["PPO"], budgets=[5]), PATIENTS, LITTLE, tmp_path, progress=False)
    assert {p: p.stat().st_mtime_ns for p in stamp} == stamp  # nothing made again
    pd.testing.assert_frame_equal(more[more.timing == "fixed"].reset_index(drop=True), few)
    assert len(more) == 2 * len(few) == 4 * 2 * 2 and set(more.patient) == {0, 1}
    place = tmp_path / "PPO-fixed-5-individual-seed0"
    assert load_policy(place / "policy").k == 2 and not list((tmp_path / "training").iterdir())
    assert load_policy(tmp_path / "PPO-fixed-5-population-seed0" / "policy").k == 1
    history = pd.read_parquet(place / "history.parquet")
    assert history.groupby("policy").step.max().to_dict() == {0: 256, 1: 256}


def test_same_numbers_in_another_folder_and_in_chunks(tmp_path):
    a = run_cell(Cell("PPO", budget=5), PATIENTS, LITTLE, tmp_path / "a")
    ones = Study(**{**LITTLE.__dict__, "chunk": 1})
    b = run_cell(Cell("PPO", budget=5), PATIENTS, ones, tmp_path / "b")
    pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-3)
    c = run_cell(Cell("PPO", budget=5, seed=1), PATIENTS, LITTLE, tmp_path / "a")
    assert not c.severity.equals(a.severity)


@pytest.mark.parametrize("change", ["settings", "courses", "patients"])
def test_what_was_made_otherwise_is_refused(tmp_path, change):
    cell = Cell("PPO", budget=5)
    run_cell(cell, PATIENTS, LITTLE, tmp_path)
    study, patients = LITTLE, PATIENTS
    if change == "settings": study = Study({"PPO": ppo.PPO(steps=512, rollout=64, hidden=(8,))}, courses=2)
    if change == "courses": study = Study(LITTLE.settings, courses=3)
    if change == "patients": patients = sepsis().select([0, 2])
    named = "config" if change == "settings" else change
    with pytest.raises(ValueError, match=f"{cell.name}: was run with other {named}"):
        run_cell(cell, patients, study, tmp_path)


def test_an_interrupted_cell_goes_on(tmp_path, monkeypatch):
    "Stopped in the middle of training, the cell ends as if it had not been; nothing half-made is left."
    cell, long = Cell("PPO", budget=5), ppo.PPO(steps=1280, rollout=64, epochs=1, hidden=(8,))
    study = Study({"PPO": long}, courses=2)
    real, calls = Student.practise, [0]

    def practise(self):
        calls[0] += 1
        if calls[0] == 15: raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Student, "practise", practise)
    with pytest.raises(KeyboardInterrupt): run_cell(cell, PATIENTS, study, tmp_path / "a")
    assert not (tmp_path / "a" / cell.name).exists()
    resumed = run_cell(cell, PATIENTS, study, tmp_path / "a")
    assert calls[0] == 15 + 10  # ten of twenty updates were kept
    pd.testing.assert_frame_equal(resumed, run_cell(cell, PATIENTS, study, tmp_path / "b"))
    assert json.loads((tmp_path / "a" / cell.name / "cell.json").read_text())["cell"]["method"] == "PPO"


def test_a_cluster_gives_the_same_table(tmp_path):
    distributed = pytest.importorskip("distributed")
    cells = grid(["PPO"], timings=["fixed"], budgets=[5])
    local = run_table(cells, PATIENTS, LITTLE, tmp_path / "local", progress=False)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, \
            distributed.Client(cluster), joblib.parallel_config(backend="dask"):
        spread = run_table(cells, PATIENTS, LITTLE, tmp_path / "cluster", n_jobs=2, progress=False)
    pd.testing.assert_frame_equal(spread, local, rtol=1e-4, atol=1e-4)


class Mortal(Septic):
    "Patients whose treatment kills the process, once: when the file `marker` is not there yet."

    asked, marker = 0, Path()

    def _over(self, model):
        other = super()._over(model)
        other.marker = self.marker
        return other

    def reward_given(self, y, u, severity):
        self.asked += 1
        if self.asked > 30 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reward_given(y, u, severity)


def test_a_killed_worker_costs_its_cell_a_retry(tmp_path):
    "A process that kills itself in the middle of a cell: the table is the same, the other cell is not made again."
    cells, mortal = grid(["PPO"], timings=["fixed"], budgets=[5]), Mortal(PATIENTS.model)
    mortal.marker = tmp_path / "marker"  # travels with the patients: the processes may be older than this test
    killed = run_table(cells, mortal, LITTLE, tmp_path / "a", n_jobs=2, progress=False)
    assert mortal.marker.exists()
    whole = run_table(cells, PATIENTS, LITTLE, tmp_path / "b", progress=False)
    pd.testing.assert_frame_equal(killed, whole, rtol=1e-4, atol=1e-4)


def test_a_given_population_is_who_the_policy_learns_on(tmp_path):
    cell = Cell("PPO", budget=5, model="population")
    mean = run_cell(cell, PATIENTS, LITTLE, tmp_path / "a")
    same = run_cell(cell, PATIENTS, LITTLE, tmp_path / "b", PATIENTS.population())
    pd.testing.assert_frame_equal(mean, same)
    other = run_cell(cell, PATIENTS, LITTLE, tmp_path / "c", sepsis().select([5]))
    assert not other.severity.equals(mean.severity)
    assert load_policy(tmp_path / "c" / cell.name / "policy").k == 1


def test_a_finished_cell_can_be_looked_at_hour_by_hour(tmp_path):
    cell = Cell("PPO", "adaptive", 5)
    courses = run_cell(cell, PATIENTS, LITTLE, tmp_path)
    hourly = trace_cell(cell, PATIENTS, LITTLE, tmp_path, copies=2, every_h=0.25)
    assert len(hourly) == 2 * 2 * (96 * 4 + 1) and set(hourly.method) == {"PPO"}
    mean = hourly[hourly.hour < 96].groupby("course").sofa.mean().to_numpy()
    safe = 1 - (hourly[hourly.hour < 96].lactate > 4).groupby(hourly.course).mean().to_numpy()
    np.testing.assert_allclose(mean, courses.severity, atol=0.05)
    np.testing.assert_allclose(safe, courses.safe, atol=0.01)
    visits = hourly.groupby("course").visit.sum().to_numpy()
    assert (visits == courses.decisions).all()
    with pytest.raises(ValueError, match="every_h=0"): trace_cell(cell, PATIENTS, LITTLE, tmp_path, every_h=0)
