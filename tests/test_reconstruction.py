"Causal reconstruction: nothing leaks from hidden cells or later rows, masks live by address, training repeats itself."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from medsim.data.normaliser import Normaliser
from medsim.data.sequences import IrregularSequences, grud_delta
from medsim.world import reconstruction
from medsim.world.afi import ENCODERS
from medsim.world.reconstruction import (
    LOCF,
    ReconstructionConfig,
    Reconstructor,
    batches,
    chances,
    chart_of,
    fit_ou,
    load_reconstructor,
    save_reconstructor,
    score,
    task,
    train_reconstruction,
    view,
)

NAMES = ("hr", "map", "lactate")
QUICK = ReconstructionConfig(units=8, k=4, epochs=2, batch=16)


@pytest.fixture(scope="module")
def stays() -> IrregularSequences:
    rng, n, rows = np.random.default_rng(0), 60, 14
    time_h = np.cumsum(rng.exponential(1, (n, rows)), 1)
    mask = np.arange(rows) < rng.integers(1, rows + 1, n)[:, None]
    mask[0] = np.arange(rows) < 1  # a stay of length 1
    observed = (rng.random((n, rows, 3)) < [0.8, 0.5, 0.2]) & mask[..., None]
    value = np.where(observed, 70 + 10 * rng.normal(size=(n, 1, 3)) + rng.normal(size=observed.shape), np.nan)
    at = np.maximum.accumulate(np.where(observed, np.arange(rows)[:, None], -1), 1)
    last = np.take_along_axis(time_h[..., None], np.maximum(at, 0), 1)
    fold = np.array(["train", "val", "test"])[np.searchsorted([0.6, 0.8], np.arange(n) / n, side="right")]
    ids = pd.DataFrame({"stay_id": np.arange(n) + 100, "subject_id": np.arange(n), "start_h": 0.0, "fold": fold})
    return IrregularSequences(
        value=value.astype(np.float32), observed=observed, delta=grud_delta(time_h, observed).astype(np.float32),
        freshness=np.where(at >= 0, time_h[..., None] - last, np.inf).astype(np.float32),
        action=np.zeros((n, rows, 0), np.float32), time_h=np.where(mask, time_h, 0), mask=mask, ids=ids,
        feature_names=NAMES, units=dict.fromkeys(NAMES, "1"), action_names=(), alignment={},
        normaliser=Normaliser.fit(value, NAMES, (fold == "train")[:, None] & mask))


def test_the_view_is_what_the_sequences_say(stays: IrregularSequences) -> None:
    chart = chart_of(stays)
    x, there = view(chart, chart.observed).inputs, stays.mask[..., None] & np.ones(3, dtype=bool)
    for ours, theirs in ((x.delta, stays.delta), (x.freshness, stays.freshness)):
        assert np.allclose(ours.numpy()[there], theirs[there], atol=1e-4)
    known = there & np.isfinite(stays.freshness)
    assert np.allclose(x.value.numpy()[known], stays.filled()[known], atol=1e-6)
    assert (x.value.numpy()[there & ~known] == 0).all()


def test_a_hidden_cell_leaves_no_trace(stays: IrregularSequences) -> None:
    chart = chart_of(stays)
    t = task(chart, 0.3, 0.4, chances(1, chart.ids, chart.value.shape[1:]))
    value = torch.where(t.shown.inputs.observed, chart.value, 99.0)
    age = torch.where(t.shown.inputs.observed, chart.age, 5.0)
    again = view(chart._replace(value=value, age=age), t.shown.inputs.observed)
    for a, b in zip(t.shown.inputs, again.inputs, strict=True): assert torch.equal(a, b)


def test_masks_live_at_their_address_and_grow_with_the_share(stays: IrregularSequences) -> None:
    chart = chart_of(stays)
    chance = chances(7, chart.ids, chart.value.shape[1:])
    assert torch.equal(chances(7, chart.ids[[9, 2]], (5, 3)), chance[[9, 2], :5])
    few, many = (task(chart, 0.2, m, chance) for m in (0.3, 0.7))
    assert torch.equal(few.now, many.now)
    assert not (many.shown.inputs.observed & ~few.shown.inputs.observed).any()


@pytest.mark.parametrize("form", ENCODERS)
def test_nothing_after_a_row_changes_its_answers(stays: IrregularSequences, form: str) -> None:
    chart = chart_of(stays)
    chart = chart.at(chart.mask.sum(1).argsort()[-10:])
    net, r = Reconstructor(NAMES, replace(QUICK, form=form)), 5
    value, time_h, seen = chart.value.clone(), chart.time_h.clone(), chart.observed.clone()
    value[:, r + 1 :], time_h[:, r + 1 :], seen[:, r + 1 :] = 9.0, time_h[:, r + 1 :] + 50, True
    other = chart._replace(value=value, time_h=time_h, observed=seen)
    (now, later), (now2, later2) = (net.predict(view(c, c.observed)) for c in (chart, other))
    assert torch.equal(now[:, : r + 1], now2[:, : r + 1]) and torch.equal(later[:, :r], later2[:, :r])
    assert not torch.equal(now[:, r + 1 :], now2[:, r + 1 :])
    same_time = other._replace(time_h=chart.time_h)  # the question about the next row is the same: so is the answer
    assert torch.equal(later[:, : r + 1], net.predict(view(same_time, seen))[1][:, : r + 1])


def test_stays_do_not_see_each_other(stays: IrregularSequences) -> None:
    chart, net = chart_of(stays), Reconstructor(NAMES, QUICK)
    alone = net.predict(view(chart.at(torch.tensor([3])), chart.at(torch.tensor([3])).observed))[0]
    crowd = net.predict(view(chart, chart.observed))[0]
    assert torch.allclose(alone[0], crowd[3, : alone.shape[1]], atol=1e-6)


def test_batches_hold_every_stay_once() -> None:
    lengths = torch.randint(1, 30, (101,), generator=torch.Generator().manual_seed(0))
    for generator in (None, torch.Generator().manual_seed(1)):
        assert torch.cat(list(batches(lengths, 8, generator))).sort().values.tolist() == list(range(101))


def test_training_repeats_itself_and_survives_the_disk(stays: IrregularSequences, tmp_path) -> None:
    state = torch.get_rng_state()
    net, again = (train_reconstruction(stays, QUICK, seed=5) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()) and net.history == again.history
    save_reconstructor(net, tmp_path / "net")
    back = load_reconstructor(tmp_path / "net")
    assert score(back, stays).equals(score(again, stays)) and back.normaliser == stays.normaliser
    with pytest.raises(ValueError, match="not empty"): save_reconstructor(net, tmp_path / "net")
    with pytest.raises(ValueError, match="reconstructor.json"): load_reconstructor(tmp_path)


def test_a_run_goes_on_where_it_was_stopped(stays: IrregularSequences, tmp_path, monkeypatch) -> None:
    config = replace(QUICK, epochs=4)
    once, epochs = train_reconstruction(stays, config, seed=5), reconstruction.epoch_of

    def stops(*given):
        if given[-1] == 2: raise KeyboardInterrupt
        return epochs(*given)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(reconstruction, "epoch_of", stops)
        train_reconstruction(stays, config, seed=5, checkpoint=tmp_path / "run")
    again = train_reconstruction(stays, config, seed=5, checkpoint=tmp_path / "run")
    assert once.history == again.history
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in once.state_dict().items())
    with pytest.raises(ValueError, match="another run"):
        train_reconstruction(stays, config, seed=6, checkpoint=tmp_path / "run")


def test_scores_are_those_counted_by_hand(stays: IrregularSequences) -> None:
    chart = chart_of(stays, "test")
    t = task(chart, 0.2, 0.0, chances(0, chart.ids, chart.value.shape[1:]))
    assert not (t.later[:, -1]).any() and torch.equal(t.truth_later[:, :-1], chart.value[:, 1:])
    table = score(LOCF(), stays).set_index(["question", "feature"])
    assert table.n["next", "all"] == int(chart.observed[:, 1:].sum()) == table.n["next"].iloc[1:].sum()
    error = (view(chart, chart.observed & False).inputs.value - chart.value)[chart.observed].abs().mean()
    blind = score(LOCF(), stays, hide=1.0).set_index(["question", "feature"]).mae["hidden", "all"]
    assert blind == pytest.approx(error.item(), rel=1e-5)  # all hidden: the mean is all that is known


def test_ou_is_no_worse_than_carrying_forward_in_training(stays: IrregularSequences) -> None:
    ou = fit_ou(stays)
    assert (ou.rate >= 0).all() and ou.rho.shape == (3,)
    fitted, carried = (score(m, stays, fold="train").query("feature == 'all'").mse.sum() for m in (ou, LOCF()))
    assert fitted <= carried * 1.02


def test_what_cannot_be_learned_from_is_refused(stays: IrregularSequences) -> None:
    blind = replace(stays, observed=stays.observed & (np.arange(3) != 2))
    with pytest.raises(ValueError, match="never observed in the training stays: lactate"):
        train_reconstruction(blind, QUICK)
    with pytest.raises(ValueError, match="fold='test'"):
        score(LOCF(), stays.select((stays.ids.fold == "train").to_numpy()))
    net = Reconstructor(("hr", "map"), QUICK)
    with pytest.raises(ValueError, match="the model knows hr, map"): score(net, stays)
    wild = replace(stays, value=np.where(stays.observed, np.float32(np.inf), stays.value))
    broken = replace(wild, normaliser=replace(stays.normaliser, low=(-np.inf,) * 3, high=(np.inf,) * 3))
    with pytest.raises(ValueError, match="hr"): train_reconstruction(broken, QUICK)
    for wrong in (dict(hide=1.0), dict(extra=(0.5, 1.0)), dict(whole=2.0), dict(form="x"), dict(rate=0.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))): ReconstructionConfig(**wrong)
