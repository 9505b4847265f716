"The world model beside the best predictor there is, on a system that is known: one hidden number, damped and treated."

import numpy as np
import pandas as pd
import torch

from medsim.data.actions import Treatments
from medsim.data.arrays import last_step
from medsim.data.episodes import Episodes
from medsim.data.normaliser import Normaliser
from medsim.world.charts import Charts
from medsim.world.learning import Descent, train_world
from medsim.world.world_model import WorldModel, open_loop, small

N, ROWS, SEEN, NOISE, DEATH = 1_200, 12, 6, np.array([0.2, 0.3]), 0.1  # DEATH: the share a hour that is forgotten
NAMES = ("a", "b", "a_new", "b_new")


def moved(x: np.ndarray, dose: np.ndarray, hours: np.ndarray) -> np.ndarray:
    "The mean of the hidden number after some hours of dx = (-x / 10 + (dose - 1) / 10) dt + .15 dW."
    return np.exp(-DEATH * hours) * x + (1 - np.exp(-DEATH * hours)) * (dose - 1)


def shaken(hours: np.ndarray) -> np.ndarray:
    "What the noise adds to its variance."
    return 0.15**2 * (1 - np.exp(-2 * DEATH * hours)) / (2 * DEATH)


def stays() -> dict[str, np.ndarray]:
    "Stays whose features are the hidden number and its negative, with errors, each seen in 60 % of the rows."
    rng = np.random.default_rng(0)
    hours, dose = rng.integers(1, 9, (N, ROWS - 1)).astype(float), rng.integers(0, 3, (N, ROWS - 1))
    x = [rng.normal(size=N)]
    for h, a in zip(hours.T, dose.T, strict=True):
        x.append(moved(x[-1], a, h) + np.sqrt(shaken(h)) * rng.normal(size=N))
    y = np.stack(x, 1)[..., None] * np.array([1.0, -1.0]) + NOISE * rng.normal(size=(N, ROWS, 2))
    return {"y": y, "seen": rng.random(y.shape) < 0.6, "hours": hours, "dose": dose}


def kalman(d: dict[str, np.ndarray]) -> np.ndarray:
    "Predictions (N, ROWS - SEEN, 2) by the true numbers, from the rows seen and the treatments after them."
    mean, var, told = np.zeros(len(d["y"])), np.ones(len(d["y"])), []
    for i in range(d["y"].shape[1]):
        if i:
            h = d["hours"][:, i - 1]
            mean, var = moved(mean, d["dose"][:, i - 1], h), np.exp(-2 * DEATH * h) * var + shaken(h)
        if i >= SEEN: told.append(np.stack([mean, -mean], -1))
        else:
            for j, sign in enumerate((1, -1)):
                gain = var / (var + NOISE[j] ** 2) * d["seen"][:, i, j]
                mean, var = mean + gain * (sign * d["y"][:, i, j] - mean), (1 - gain) * var
    return np.stack(told, 1)


def charts(d: dict[str, np.ndarray]) -> Charts:
    at = np.maximum.accumulate(np.where(d["seen"], np.arange(ROWS)[:, None], -1), 1)
    value = np.where(at < 0, 0.0, np.take_along_axis(d["y"], np.maximum(at, 0), 1))
    obs, mask = np.concatenate([value, d["seen"]], -1).astype(np.float32), np.ones((N, ROWS - 1), bool)
    ids = pd.DataFrame({"stay_id": np.arange(N), "subject_id": np.arange(N), "start_h": 0.0,
                        "fold": np.where(np.arange(N) < 1_000, "train", "test")})
    return Charts.of(Episodes(
        obs=obs[:, :-1], final_obs=obs[:, -1], action=d["dose"], reward=np.zeros(mask.shape), cost=np.zeros(mask.shape),
        dt=d["hours"], mask=mask, terminated=np.zeros_like(mask), truncated=last_step(mask), ids=ids,
        normaliser=Normaliser.as_is(NAMES),
        feature_names=NAMES, units=dict.fromkeys(NAMES, "1"), alignment={"source": "a known system"},
        action_spec=Treatments(("dose",), ("number",), (0.0,), (2.0,), ((0.0, 1.0, 2.0),))))


def test_the_filter_by_hand():
    d = {"y": np.zeros((1, SEEN + 1, 2)), "seen": np.zeros((1, SEEN + 1, 2), bool), "hours": np.full((1, SEEN), 10.0),
         "dose": np.full((1, SEEN), 2)}
    d["y"][0, -2], d["seen"][0, -2, 0] = 1.5, True  # one value, in the last row seen; before it only the dose
    mean, var = 1 - np.exp(-(SEEN - 1)), np.exp(-2 * (SEEN - 1)) + shaken(10.0 * (SEEN - 1))
    mean += var / (var + 0.2**2) * (1.5 - mean)
    np.testing.assert_allclose(kalman(d)[0, 0, 0], np.exp(-1) * mean + 1 - np.exp(-1))


def test_the_world_model_comes_near_the_best_prediction():
    d = stays()
    c, test, settings = charts(d), np.arange(1_000, N), small(memory=32, hidden=32, groups=4, units=32, free=0.1)
    rows, seen = c.rows(test, np.zeros(200, int), ROWS), d["seen"][test, SEEN:]

    def error(told: np.ndarray) -> float: return ((told - d["y"][test, SEEN:]) ** 2)[seen].mean()

    def mean_future(model: WorldModel) -> np.ndarray:
        random = torch.Generator().manual_seed(0)
        return torch.stack([open_loop(model, rows, SEEN, random)[0] for _ in range(16)]).mean(0).double().numpy()

    best, last = error(kalman(d)[test]), error(np.repeat(c.value[test, SEEN - 1, None], ROWS - SEEN, 1))
    model, _ = train_world(c, settings, Descent(steps=200, batch=32, length=ROWS, rate=4e-3, validate_every=100),
                           progress=False)
    found, before = error(mean_future(model)), error(mean_future(WorldModel(2, 3, settings)))
    assert best < found < 1.3 * best, f"{found / best:.2f} times the Kalman predictor's error"
    assert min(last, before, error(np.zeros(2))) > 1.6 * best  # nor last values, nor 0, nor an untrained model pass
