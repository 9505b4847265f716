"Rows, latent states and the world model: nothing is seen ahead, nothing crosses stays, pairs are not off by one."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsim.agents.onpolicy import Diverged
from medsim.data.episodes import Episodes
from medsim.world.charts import Charts, Rows, Windows, rows_after, rows_of_states
from medsim.world.imagination import (
    ActorConfig,
    ActorCritic,
    ImagineConfig,
    actor_critic_losses,
    imagine,
    lambda_returns,
    still_going,
)
from medsim.world.learning import Descent, train_world
from medsim.world.rssm import Observer, RSSMConfig, balanced, divergence, drawn, floored
from medsim.world.world_model import (
    WorldModel,
    before,
    open_loop,
    small,
    symexp,
    symlog,
    two_hot,
    two_hot_mean,
    world_loss,
)

TOY = Episodes.example(60, seed=2)
CHARTS = Charts.of(TOY)


def model(**changes) -> WorldModel: return WorldModel(2, 25, small(**changes), seed=1, names=CHARTS.feature_names)


def rows() -> Rows: return Windows(CHARTS, 8).batch(torch.tensor(5), 0, 16)


# ---- charts


def test_rows_pair_what_was_seen_with_what_was_then_chosen():
    whole = CHARTS.rows(np.arange(60), np.zeros(60, int), 13)
    for i, n in enumerate(TOY.mask.sum(1)):
        assert whole.mask[i].sum() == n + 1 and whole.first[i].tolist() == [True] + [False] * 12
        assert whole.chosen[i, :n].tolist() == TOY.action[i, :n].tolist() and (whole.chosen[i, n:] == -1).all()
        assert whole.action[i, 1 : n + 1].tolist() == TOY.action[i, :n].tolist() and whole.action[i, 0] == -1
        np.testing.assert_array_equal(whole.value[i, :n], TOY.obs[i, :n])
        np.testing.assert_array_equal(whole.value[i, n], TOY.final_obs[i])
        np.testing.assert_array_equal(whole.reward[i, 1 : n + 1], TOY.reward[i, :n])
        assert whole.ended[i].nonzero().flatten().tolist() == ([n] if TOY.terminated[i].any() else [])


@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_windows_stay_within_a_stay(length: int, size: int, data: st.DataObject):
    b = Windows(CHARTS, length, data.draw(st.sampled_from(["train", "val", "test"]))).batch(torch.tensor(0), 3, size)
    hours = b.hours.double().cumsum(1)
    assert b.mask[:, 0].all() and (b.mask[:, 1:] <= b.mask[:, :-1]).all() and (hours.diff(dim=1) >= 0).all()
    stays = [int(np.flatnonzero((CHARTS.value == b.value[i, 0].numpy()).all(-1).any(1))[0]) for i in range(size)]
    for i, stay in enumerate(stays):
        n = int(b.mask[i].sum())
        own = {tuple(x) for x in CHARTS.value[stay][CHARTS.mask[stay]].tolist()}
        assert {tuple(x) for x in b.value[i, :n].tolist()} <= own and (b.value[i, n:] == 0).all()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**20))
def test_steps_and_rows(n: int, t: int, seed: int):
    rng = np.random.default_rng(seed)
    mask = np.arange(t) < rng.integers(1, t + 1, n)[:, None]
    x, obs, final = rng.normal(size=(n, t)), rng.normal(size=(n, t, 2)), rng.normal(size=(n, 2))
    led, seen = rows_after(x, mask, 7.0), rows_of_states(obs, final, mask)
    assert (led[:, 0] == 7).all() and (led[:, 1:][mask] == x[mask]).all() and (led[:, 1:][~mask] == 7).all()
    last = mask.sum(1)
    assert (seen[np.arange(n), last] == final).all() and (seen[:, :-1][mask] == obs[mask]).all()


def test_bad_charts_are_refused():
    gone = CHARTS.observed.copy()
    gone[..., 1] = False
    with pytest.raises(ValueError, match="never observed in a training stay: lactate"): replace(CHARTS, observed=gone)
    with pytest.raises(ValueError, match="ids outside 0..24"): replace(CHARTS, action=CHARTS.action + 25)
    with pytest.raises(ValueError, match="no stay is in fold 'val'"):
        Windows(replace(CHARTS, ids=CHARTS.ids.assign(fold="train")), 5, "val")


# ---- latent states


@given(st.floats(-300, 300))
def test_rewards_come_back(x: float):
    t = torch.tensor([x], dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(t)), t)
    torch.testing.assert_close(two_hot_mean((two_hot(t) + 1e-30).log()), t, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_divergence_is_none_or_more(seed: int):
    g = torch.Generator().manual_seed(seed)
    q, p = (floored(3 * torch.randn(4, 3, 5, generator=g), 0.05) for _ in range(2))
    assert (divergence(q, p) >= 0).all() and divergence(q, q).abs().max() < 1e-5
    assert (balanced(q, p, free=1.0) >= 0.6 - 1e-6).all()
    assert (drawn(q, torch.rand(4, 3, generator=g)).detach().sum(-1) - 1).abs().max() < 1e-5


def test_the_posterior_sees_nothing_ahead():
    m, b = model(), rows()
    for t in (1, 4, 7):
        later = Rows(*(torch.cat([x[:, :t], x[:, t:].flip(1)], 1) for x in b))._replace(first=b.first)
        one, two = (m.observe(x, torch.Generator().manual_seed(0)) for x in (b, later))
        for x, y in zip(one, two, strict=True): assert torch.equal(x[:, :t], y[:, :t])


def test_gaps_matter_only_where_they_are_asked_for():
    b = rows()
    slow = b._replace(hours=b.hours * 3)
    for gaps, same in (("input", False), ("none", True)):
        m = model(gaps=gaps)
        assert torch.equal(m.observe(b).h, m.observe(slow).h) == same


def test_the_decoder_is_not_given_what_it_must_tell():
    b = rows()
    moved = b._replace(value=b.value + torch.arange(8.0)[:, None] * (torch.arange(8) == 5)[:, None])
    last, moved_last = before(b)[0], before(moved)[0]
    assert torch.equal(last[:, :6], moved_last[:, :6]) and not torch.equal(last[:, 6], moved_last[:, 6])


def test_every_weight_learns_but_for_what_is_free():
    m, b = model(mortality=True, free=0.0), rows()
    loss, parts, _ = world_loss(m, b, torch.Generator().manual_seed(0))
    loss.backward()
    still = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == [] and all(torch.isfinite(x) for x in parts.values())
    gone = replace(CHARTS, ids=CHARTS.ids.drop(columns="died"))
    with pytest.raises(ValueError, match="who died"): train_world(gone, small(mortality=True))
    with pytest.raises(ValueError, match="no head for death"): model().death(m.observe(b))


def test_same_seed_same_model_whatever_the_global_generator_did():
    one = model()
    torch.manual_seed(99)
    torch.rand(5)
    two = model()
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    b = rows()
    l1, l2 = (world_loss(m, b, torch.Generator().manual_seed(3))[0] for m in (one, two))
    assert torch.equal(l1, l2)


def test_open_loop_does_not_look_but_knows_the_treatments():
    m, b = model(), rows()
    told = open_loop(m, b, 3)[0]
    blind = b._replace(value=torch.cat([b.value[:, :3], b.value[:, 3:] + 5], 1), observed=b.observed.roll(1, 0))
    blind = blind._replace(observed=torch.cat([b.observed[:, :3], blind.observed[:, 3:]], 1))
    assert torch.equal(told, open_loop(m, blind, 3)[0])
    other = b._replace(action=torch.cat([b.action[:, :5], (b.action[:, 5:] + 1) % 25], 1))
    after = open_loop(m, other, 3)[0]
    assert torch.equal(told[:, :2], after[:, :2]) and not torch.equal(told[:, 2:], after[:, 2:])
    with pytest.raises(ValueError, match="context=8: needs 1 to 7"): open_loop(m, b, 8)


def test_a_first_row_forgets():
    m = Observer(RSSMConfig(2, 3, memory=8, hidden=8, groups=2, classes=3))
    g = torch.Generator().manual_seed(0)
    code, action, first = torch.randn(4, 6, 3, generator=g), torch.rand(4, 6, 2, generator=g), torch.zeros(4, 6).bool()
    first[:, [0, 3]] = True
    hours = torch.full((4, 6), 4.0)
    whole = m.observe(code, action, hours, first)
    half = m.observe(code[:, 3:], action[:, 3:], hours[:, 3:], first[:, 3:])
    torch.testing.assert_close(whole.h[:, 3:], half.h)


# ---- imagination


@given(st.integers(1, 6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
@settings(max_examples=40)
def test_returns_are_those_of_the_definition(h: int, gamma: float, lam: float, seed: int):
    g = torch.Generator().manual_seed(seed)
    r, c, v = (torch.randn(3, h, generator=g), torch.rand(3, h, generator=g), torch.randn(3, h + 1, generator=g))
    out, last = lambda_returns(r, c, v, gamma, lam), v[:, h]
    for t in reversed(range(h)):
        last = r[:, t] + gamma * c[:, t] * ((1 - lam) * v[:, t + 1] + lam * last)
        torch.testing.assert_close(out[:, t], last)


def test_imagination_pairs_a_state_with_what_was_chosen_in_it():
    m, b = model(), rows()
    agent = ActorCritic(m.rssm.config.n_features, 25, ActorConfig(units=8), seed=1)
    start = m.observe(b, torch.Generator().manual_seed(0)).at((slice(None), -1))
    seen = imagine(m, start, agent, 4, generator=torch.Generator().manual_seed(1))
    again = imagine(m, start, agent, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(seen.action, again.action) and seen.latent.h.shape[1] == 5 and seen.reward.shape == (16, 4)
    for x, y in zip(seen.latent, start, strict=True): assert torch.equal(x[:, 0], y)
    s = seen.latent.at((slice(None), 1))
    on = m.rssm.imagine_step(s, m.treated(seen.action[:, 1]), torch.full((16,), 4.0))
    torch.testing.assert_close(on.h, seen.latent.h[:, 2])  # chosen in state 1, it led to state 2
    with pytest.raises(ValueError, match="horizon=0"): imagine(m, start, agent, 0)


def test_what_follows_an_end_does_not_count():
    assert still_going(torch.tensor([[1.0, 0.5, 0.0, 1.0]])).tolist() == [[1, 1, 0.5, 0]]


def test_leaving_the_clinicians_has_its_price():
    m, b = model(), rows()
    agent = ActorCritic(m.rssm.config.n_features, 25, ActorConfig(units=8), seed=1)
    seen = imagine(m, m.observe(b).at((slice(None), 0)), agent, 3, generator=torch.Generator().manual_seed(1))
    same = agent.log_probs(seen.latent.features[:, :-1]).detach()
    config = ImagineConfig(horizon=3, clinician=1.0)
    assert actor_critic_losses(agent, seen, config, same)["from_clinicians"].abs() < 1e-6
    other = torch.full_like(same, -20.0).index_fill(-1, torch.tensor([3]), 0.0).log_softmax(-1)
    assert actor_critic_losses(agent, seen, config, other)["from_clinicians"] > 10
    with pytest.raises(ValueError, match="needs the clinicians"): actor_critic_losses(agent, seen, config)


# ---- learning


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path):
    short = Descent(steps=6, batch=4, length=5, rate=1e-3, validate_every=2)

    def stop(row: dict, step: int) -> None:
        if step == 4: raise KeyboardInterrupt

    whole, history = train_world(CHARTS, small(), short, seed=2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_world(CHARTS, small(), short, seed=2, progress=False, checkpoint=tmp_path / "run", log=stop)
    again, more = train_world(CHARTS, small(), short, seed=2, progress=False, checkpoint=tmp_path / "run")
    assert history.equals(more)
    assert all(torch.equal(x, y) for x, y in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="checkpoint of another run"):
        train_world(CHARTS, small(), short, seed=3, progress=False, checkpoint=tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run_and_says_where():
    bad = replace(CHARTS, value=np.where(CHARTS.mask[..., None], CHARTS.value * 1e30, 0))
    with pytest.raises((Diverged, ValueError), match=r"step 0: .* is not a finite number"):
        train_world(bad, small(), Descent(steps=2, batch=4, length=5, validate_every=2), progress=False)
