"Figures draw the numbers they were given."

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from medsim.bench.figures import (
    draw_budgets,
    draw_models,
    draw_over_time,
    draw_patient,
    draw_tradeoff,
    hourly_mean,
    mean_over_patients,
)
from medsim.bench.metrics import by_patient
from medsim.bench.protocol import MODELS, TIMINGS


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def courses() -> pd.DataFrame:
    rng, cells = np.random.default_rng(0), []
    for method in ("PPO", "TRPO-Lag"):
        for timing in TIMINGS:
            for model in MODELS:
                for budget in (5, 20):
                    cells.append(pd.DataFrame({
                        "patient": np.repeat(np.arange(6), 2), "severity": rng.normal(5, 1, 12),
                        "safe": rng.uniform(size=12),
                    }).assign(method=method, timing=timing, model=model, budget=budget))
    return pd.concat(cells, ignore_index=True)


def hourly(level: float) -> pd.DataFrame:
    patient, hour = np.repeat(np.arange(6), 5), np.tile(np.arange(5.0), 6)
    return pd.DataFrame({"patient": patient, "course": patient, "hour": hour, "sofa": level + 0.1 * patient + hour,
                         "visit": hour % 2 == 0})


def test_budgets():
    made = courses()
    axes = draw_budgets(made, "safe")
    assert [ax.get_title() for ax in axes] == ["PPO", "TRPO-Lag"]
    rows = made.query("method == 'PPO' and timing == 'adaptive' and model == 'individual'")
    wanted = [100 * by_patient(r, "safe").mean() for _, r in rows.groupby("budget")]
    drawn = [line.get_ydata() for line in axes[0].lines if len(line.get_ydata()) == 2]
    assert any(np.allclose(y, wanted) for y in drawn)
    x = mean_over_patients(rows, "severity")
    assert x.low < x.value < x.high and x.n == 6


def test_models():
    axes = draw_models(courses(), 5)
    assert len(axes) == 2 and all(len(ax.patches) == 4 and len(ax.texts) == 2 for ax in axes)
    assert all(text.get_text().endswith(" %") for ax in axes for text in ax.texts)


def test_over_time_and_one_patient():
    ways = {"a": hourly(3.0), "b": hourly(4.0)}
    mean = hourly_mean(ways["a"], "sofa")
    np.testing.assert_allclose(mean["mean"], 3.25 + np.arange(5))
    assert ((mean.low <= mean["mean"]) & (mean["mean"] <= mean.high)).all()
    ax = draw_over_time(ways, ["sofa"], ["SOFA (points)"], {"sofa": 4})[0]
    assert len(ax.lines) == 3 and ax.get_ylabel() == "SOFA (points)"
    panel = draw_patient(ways, 2, ["sofa"], across=1)[0, 0]
    np.testing.assert_allclose(panel.lines[0].get_ydata(), 3.2 + np.arange(5))
    assert len(panel.lines[1].get_ydata()) == 3  # visits
    with pytest.raises(ValueError, match="patient 9: not among 0, 1"): draw_patient(ways, 9, ["sofa"])


def test_tradeoff():
    made = courses()
    axes = draw_tradeoff(made)
    assert [ax.get_title() for ax in axes] == ["5 decisions", "20 decisions"]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes[0].lines if line.get_marker() in "os"]
    rows = made.query("method == 'PPO' and timing == 'fixed' and model == 'population' and budget == 5")
    wanted = (by_patient(rows, "severity").mean(), 100 * by_patient(rows, "safe").mean())
    assert any(np.allclose(p, wanted) for p in points if len(np.atleast_1d(p)) == 2)
