"Tables of runs: cells by name, kept, resumed, never mixed."

import json

import pandas as pd
import pytest
import torch

from medsim.agents import ppo, sac
from medsim.agents.onpolicy import Student
from medsim.agents.policy import load_policy
from medsim.bench.protocol import METHODS, Cell, Study, grid, run_cell, run_table
from medsim.envs.registration import sepsis

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
