"Normaliser and Episodes: nothing leaks from test to training, nothing is lost on disk, every fault is named."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.data.actions import Continuous
from medsim.data.arrays import FOLDS, EpisodeArrays, last_step
from medsim.data.episodes import Episodes, discounts
from medsim.data.normaliser import Normaliser

seeds = st.integers(0, 10_000)


def continuous(seed: int = 0) -> Episodes:
    "Toy episodes with continuous actions, known behaviour densities and some truncated ends."
    toy, rng = Episodes.example(30, 6, seed), np.random.default_rng(seed)
    cut = toy.terminated & (rng.random((len(toy), 1)) < 0.5)
    return replace(
        toy, action=rng.random((*toy.mask.shape, 3)), action_spec=Continuous(), terminated=toy.terminated & ~cut,
        truncated=cut, behaviour_prob=rng.random(toy.mask.shape) * 3 + 0.1, dt=rng.random(toy.mask.shape) + 0.5,
    )


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(-1e6, 1e6))
def test_normaliser_does_not_change_when_test_rows_change(seed, anything):
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((20, 5, 3)) < 0.2, np.nan, rng.lognormal(size=(20, 5, 3)))
    train = np.r_[np.ones(12, bool), np.zeros(8, bool)][:, None] & np.ones(5, bool)
    fitted = Normaliser.fit(x, "abc", train, log="b")
    changed = np.where(train[..., None], x, anything)
    assert Normaliser.fit(changed, "abc", train, log="b") == fitted
    assert fitted == Normaliser.fit(x[:12], "abc", log="b")


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_normaliser_round_trip_inside_the_bounds(seed):
    rng = np.random.default_rng(seed)
    x = rng.lognormal(1, 1, (50, 2))
    fitted = Normaliser.fit(x, ("a", "b"), low={"a": 0.5}, high={"a": 8}, log=["b"])
    z = fitted.transform(x)
    assert np.allclose(fitted.inverse(z)[:, 0], np.clip(x[:, 0], 0.5, 8), rtol=1e-4)
    assert np.allclose(fitted.inverse(z)[:, 1], x[:, 1], rtol=1e-4, atol=1e-5)
    assert np.allclose(z.mean(0), 0, atol=1e-4) and np.allclose(z.std(0), 1, atol=1e-3)
    assert Normaliser.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False))) == fitted


def test_normaliser_handles_constants_and_names_what_it_never_saw():
    x = np.c_[np.full(9, 0.1), np.full(9, np.nan), np.arange(9.0)]
    with pytest.raises(ValueError, match="never observed in the training rows: b;"):
        Normaliser.fit(x, "abc")
    z = Normaliser.fit(x[:, [0, 2]], "ac").transform(np.array([[0.1, np.nan], [np.nan, 4]]))
    assert z.tolist() == [[0, 0], [0, 0]]


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_split_shares_no_subject_and_loses_no_episode(seed):
    toy = Episodes.example(60, 4, seed)
    parts = toy.split()
    subjects = [set(parts[f].ids.subject_id) for f in FOLDS]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])
    assert sorted(np.concatenate([parts[f].ids.stay_id for f in FOLDS])) == toy.ids.stay_id.tolist()
    assert all((parts[f].ids.fold == f).all() for f in FOLDS)


def test_split_refuses_a_subject_in_two_folds():
    toy = Episodes.example(20, 4)
    ids = toy.ids.assign(subject_id=7, fold=["train", "test"] * 10)
    with pytest.raises(ValueError, match="1 subjects are in two folds"):
        replace(toy, ids=ids).split()
    with pytest.raises(ValueError, match="'subject' only"):
        toy.split(by="stay")


@settings(max_examples=8, deadline=None)
@given(seeds, st.booleans())
def test_save_and_load_is_identity(tmp_path_factory, seed, discrete):
    made = Episodes.example(20, 5, seed) if discrete else continuous(seed)
    hadm, start = pd.array([None, 5] * (len(made) // 2), dtype="Int64"), np.where(made.ids.stay_id % 3, -0.1, np.nan)
    ids = made.ids.assign(start_h=start, hadm_id=hadm)
    made = replace(made, alignment={"step_h": 4, "window_h": [-24, 48]}, ids=ids)
    folder = tmp_path_factory.mktemp("episodes") / "x"
    made.save(folder)
    again = Episodes.load(folder)
    assert again.data_hash() == made.data_hash()
    assert again.arrays().keys() == made.arrays().keys()
    for name, x in made.arrays().items():
        assert (again.arrays()[name] == x).all() and again.arrays()[name].dtype == x.dtype
    pd.testing.assert_frame_equal(again.ids, made.ids)
    assert again.action_spec == made.action_spec and again.normaliser == made.normaliser
    assert again.units == made.units and again.alignment == made.alignment and type(again) is Episodes


def test_save_overwrites_nothing_and_load_refuses_what_is_wrong(tmp_path):
    toy, folder = Episodes.example(20, 4), tmp_path / "x"
    toy.save(folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert set(before) == {"arrays.safetensors", "episodes.json"}
    with pytest.raises(ValueError, match="not empty"):
        toy.save(folder)
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()} and len(list(tmp_path.iterdir())) == 1
    text = (folder / "episodes.json").read_text()
    for broken, match in (
        (text.replace('"version": 1', '"version": 2'), "version 2, this medsim reads 1"),
        (text.replace('"toy"', '"yot"'), "hash does not match"),
    ):
        (folder / "episodes.json").write_text(broken)
        with pytest.raises(ValueError, match=match):
            Episodes.load(folder)
    (folder / "arrays.safetensors").unlink()
    with pytest.raises(ValueError, match="no arrays.safetensors"):
        Episodes.load(folder)
    with pytest.raises(ValueError, match="no episodes.json"):
        Episodes.load(tmp_path)


def test_what_json_cannot_hold_leaves_nothing_behind(tmp_path):
    toy = replace(Episodes.example(20, 4), alignment={"since": pd.Timestamp("2020")})
    with pytest.raises(ValueError, match="JSON"):
        toy.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_hash_sees_every_field():
    base = continuous()
    mask = base.mask
    changes = {
        "obs": base.obs + 1, "action": 1 - base.action, "reward": base.reward + mask, "cost": base.cost + mask,
        "dt": base.dt + mask, "terminated": base.truncated, "final_obs": base.final_obs + 1,
        "ids": base.ids.assign(start_h=1.0), "units": {"map": "kPa", "lactate": "mmol/L"}, "alignment": {},
        "action_spec": Continuous(max_fluid=400), "behaviour_prob": base.behaviour_prob + mask,
        "normaliser": replace(base.normaliser, sd=(1.0, 1.0)),
    }
    changes["terminated"] = base.truncated
    hashes = [base.data_hash()]
    for field, value in changes.items():
        extra = {"truncated": base.terminated} if field == "terminated" else {}
        hashes.append(replace(base, **{field: value}, **extra).data_hash())
    assert len(set(hashes)) == len(hashes)
    assert continuous().data_hash() == hashes[0]


def test_padding_is_zero_and_cannot_leak():
    toy = continuous()
    x = toy.obs.copy()
    x[~toy.mask] = np.nan
    same = replace(toy, obs=x, reward=np.where(toy.mask, toy.reward, np.inf))
    assert same.data_hash() == toy.data_hash()
    assert (toy.behaviour_prob[~toy.mask] == 1).all() and (toy.action[~toy.mask] == 0).all()


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_transitions_follow_the_episode(seed):
    e = continuous(seed)
    flat = e.transitions()
    assert len(flat["reward"]) == e.mask.sum()
    i, t = flat["episode"], flat["t"]
    for name in ("obs", "action", "reward", "cost", "dt", "behaviour_prob"):
        assert (flat[name] == getattr(e, name)[i, t]).all()
    end = flat["terminated"] | flat["truncated"]
    assert (flat["next_obs"][~end] == e.obs[i[~end], t[~end] + 1]).all()
    assert (flat["next_obs"][end] == e.final_obs[i[end]]).all() and end.sum() == len(e)
    per_fold = [e.transitions(f) for f in FOLDS]
    assert sum(len(p["t"]) for p in per_fold) == len(t)
    assert all((e.ids.fold.to_numpy()[p["episode"]] == f).all() for p, f in zip(per_fold, FOLDS, strict=True))
    with pytest.raises(ValueError, match="choose one of"):
        e.transitions("holdout")


@given(seeds, st.floats(0.5, 1))
def test_discounts_per_hour_do_not_depend_on_how_a_stay_is_cut(seed, gamma):
    dt = np.random.default_rng(seed).random((1, 6)) + 0.1
    fine = np.repeat(dt / 2, 2, axis=1)
    assert np.allclose(discounts(dt, dt > 0, gamma, "hour"), discounts(fine, fine > 0, gamma, "hour")[:, ::2])
    assert np.allclose(discounts(np.ones((1, 6)), dt > 0, gamma, "hour"), discounts(dt, dt > 0, gamma))


def test_returns_and_physical_values():
    e = Episodes.example(40, 5)
    assert np.allclose(e.returns(), np.where(e.ids.died, -15, 15))
    steps = e.mask.sum(1)
    assert np.allclose(e.returns(0.9), e.returns() * 0.9 ** (steps - 1))
    assert np.allclose(e.returns(0.9, "hour"), e.returns() * 0.9 ** (4.0 * (steps - 1)))
    pressure = e.physical("map")
    assert (np.isnan(pressure) == ~e.mask).all() and 40 < np.nanmean(pressure) < 100
    with pytest.raises(ValueError, match="no feature 'sofa'"):
        e.physical("sofa")


def test_select_summary_and_repr():
    e = Episodes.example(40, 5)
    part = e.select([3, 1])
    assert part.ids.stay_id.tolist() == [3, 1] and part.ids.index.tolist() == [0, 1] and len(part) == 2
    assert (part.obs == e.obs[[3, 1]]).all() and type(part) is Episodes
    assert len(e.select(slice(0, 5))) == 5 and len(e.select(7)) == 1 and len(e.select(np.zeros(40, bool))) == 0
    none = e.select([])
    assert none.returns().shape == (0,) and len(none.transitions()["t"]) == 0 and none.data_hash() != e.data_hash()
    s = e.summary()
    assert s.episodes["all"] == 40 and s.steps.iloc[:3].sum() == s.steps["all"] == e.mask.sum()
    assert np.isclose(s.died["all"], e.ids.died.mean())
    assert e.select([0, 1]).summary().died.dtype == float
    assert repr(part) == f"Episodes(2 episodes, {part.mask.sum()} steps, at most 5, 2 features)"


def test_plots_return_axes():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for e in (Episodes.example(40, 5), continuous()):
        for draw in (e.plot_actions, e.plot_returns, e.plot_lengths):
            assert isinstance(draw(), plt.Axes)
            plt.close("all")


def broken(field: str, where: tuple[int, ...], value: float):
    "Toy episodes of which number 3 has all four steps, and a field with one entry of it replaced."
    toy = replace(Episodes.example(20, 4), behaviour_prob=np.full((20, 4), 0.5))
    toy = toy.select([0, 1, 2, toy.mask.all(1).argmax()])
    x = getattr(toy, field).copy()
    x[where] = value
    return toy, {field: x}


@pytest.mark.parametrize(
    "field, where, value, match",
    [
        ("obs", (3, 1, 1), np.nan, "obs: episode 3, step 1: NaN or infinite in lactate"),
        ("final_obs", (3, 0), np.inf, "final_obs: episode 3: NaN or infinite in map"),
        ("action", (3, 1), 25, "action: episode 3, step 1"),
        ("action", (3, 1), -1, "action: episode 3, step 1"),
        ("reward", (3, 1), np.nan, "reward: episode 3, step 1"),
        ("cost", (3, 1), -np.inf, "cost: episode 3, step 1"),
        ("dt", (3, 1), 0, "dt: episode 3, step 1: must be above 0"),
        ("dt", (3, 1), -4, "dt: episode 3, step 1: must be above 0"),
        ("dt", (3, 1), np.nan, "dt: episode 3, step 1"),
        ("behaviour_prob", (3, 1), 0, "behaviour_prob: episode 3, step 1"),
        ("behaviour_prob", (3, 1), 1.5, "behaviour_prob: episode 3, step 1"),
        ("mask", (3, 0), False, "mask: episode 3, step 1: follows a gap"),
        ("mask", (3, slice(None)), False, "mask: episode 3: has no step"),
        ("terminated", (3, 0), True, "terminated: episode 3, step 0: is True before"),
        ("truncated", (3, 0), True, "truncated: episode 3, step 0: is True before"),
        ("terminated", (3, slice(None)), False, "terminated: episode 3, step .: the last step"),
        ("truncated", (3, -1), True, "terminated: episode 3, step 3: the last step"),
    ],
)
def test_every_fault_names_field_episode_and_step(field, where, value, match):
    toy, change = broken(field, where, value)
    with pytest.raises(ValueError, match=match):
        replace(toy, **change)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"reward": np.zeros((20, 3))}, r"reward: shape \(20, 3\)"),
        ({"final_obs": np.zeros((19, 2))}, "final_obs: shape"),
        ({"mask": np.ones(20, bool)}, "mask: shape"),
        ({"action": np.zeros((20, 4))}, "integer ids"),
        ({"units": {"map": "mmHg"}}, "feature_names"),
        ({"feature_names": ("lactate", "map")}, "feature_names"),
        ({"ids": pd.DataFrame({"stay_id": range(20)})}, "lacks the columns subject_id, start_h, fold"),
    ],
)
def test_shapes_and_names_must_agree(change, match):
    with pytest.raises(ValueError, match=match):
        replace(Episodes.example(20, 4), **change)


def test_ids_rows_and_folds():
    toy = Episodes.example(20, 4)
    with pytest.raises(ValueError, match="ids: 19 rows for 20"):
        replace(toy, ids=toy.ids.iloc[:19])
    with pytest.raises(ValueError, match="ids: episode 0: fold"):
        replace(toy, ids=toy.ids.assign(fold=pd.NA))


def test_continuous_actions_are_checked_too():
    e = continuous()
    x = e.action.copy()
    x[2, 0, 1] = 1.5
    with pytest.raises(ValueError, match=r"action: episode 2, step 0: must be in \[0, 1\]"):
        replace(e, action=x)
    assert isinstance(e, EpisodeArrays) and e.action.dtype == np.float32
    assert replace(e, action=e.action.astype(float)).data_hash() == e.data_hash()


def test_to_minari_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(ImportError, match=r"pip install \"medsim\[minari\]\""):
        Episodes.example(20, 4).to_minari("toy/a-v0")


@pytest.mark.parametrize("make", [lambda: Episodes.example(12, 5), continuous])
def test_to_minari_keeps_what_minari_holds(make, monkeypatch, tmp_path):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    e = make()
    e.to_minari("medsim/toy-v0")
    data = minari.load_dataset("medsim/toy-v0")
    assert data.total_episodes == len(e) and data.total_steps == e.mask.sum()
    for episode in data.iterate_episodes():
        i, n = episode.id, e.mask[episode.id].sum()
        assert np.allclose(episode.observations, np.concatenate([e.obs[i, :n], e.final_obs[[i]]]))
        assert np.allclose(episode.actions, e.action[i, :n]) and np.allclose(episode.rewards, e.reward[i, :n])
        assert (episode.terminations == e.terminated[i, :n]).all() and (episode.truncations == e.truncated[i, :n]).all()
        assert np.allclose(np.asarray(episode.infos["dt"]).ravel()[1:], e.dt[i, :n])
    assert data.observation_space.shape == (2,) and last_step(e.mask).sum() == len(e)
