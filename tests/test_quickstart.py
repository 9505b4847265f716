"The main job: from the sample to a report, policies and a verdict; a browser shows all of it; an empty cohort is told."

import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from browser import CHROMIUM, asked

from medsim.agents.policy import load_policy
from medsim.bench.command import main
from medsim.core.paths import sample_folder
from medsim.world.bedside import load_dreamer

STAGES = ("Records", "Cohort", "Episodes", "Simulators", "Environments", "Learning by practice",
          "Learning from the records", "A log whose truth is known", "Policies", "Verdict")


@pytest.mark.notebooks
def test_from_the_sample_to_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "quickstart"
    assert main(["quickstart", "--out", str(out)]) == 0
    told = json.loads((out / "metrics.json").read_text())
    assert told["not done"] == {} and told["scale"] == "smoke" and told["verdict"] in capsys.readouterr().out
    assert {"records", "cohort", "fidelity", "surrogate", "practice", "records values", "known truth"} <= told.keys()
    assert max(told["surrogate"].values()) < 0.1  # standard deviations of what is charted

    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f">{stage}</h2>" in page for stage in STAGES) and page.count("<figure>") == 8
    for folder in (saved := sorted((out / "policies").iterdir())):
        assert "Not for clinical use" in (folder / "README.md").read_text(encoding="utf-8")
        if folder.name != "medDreamer": assert load_policy(folder).signatures
    load_dreamer(out / "policies" / "medDreamer")
    assert len(saved) == 9  # BC and IQL on records and on the log, four of PPO-Lag, medDreamer

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(["quickstart", "--out", str(out)]) == 2 and "finished run" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    if CHROMIUM is None: pytest.skip("no chromium on PATH: the page was not looked at")
    for width, dark in ((1280, False), (390, True)):
        (folder := tmp_path / str(width)).mkdir()
        said, console = asked(page, width, dark, folder)
        assert console == [] and said["scroll"] <= width and said["text"] <= width
        assert said["shown"] == ["dark" if dark else "light"] * 8
        assert all(complete and natural > 0 for complete, natural, _ in said["images"])


def test_an_empty_cohort_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture):
    children = tmp_path / "children"
    shutil.copytree(sample_folder(), children)
    file = children / "hosp/patients.csv.gz"
    with gzip.open(file, "rt") as f: rows = pd.read_csv(f).assign(anchor_age=9)
    rows.to_csv(file, index=False)
    assert main(["quickstart", "--data", str(children), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("medsim:") and "'Cohort'" in said and "no stay" in said
    assert not (tmp_path / "out" / "report.html").exists()
