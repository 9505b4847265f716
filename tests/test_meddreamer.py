"medDreamer: returns by hand, both phases go on where they stopped, limits are kept, and the bedside is the chart."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from medsim.agents.cards import NEEDS, NOTICE, Card
from medsim.data.episodes import Episodes
from medsim.envs.registration import sepsis
from medsim.envs.rollout import rollout, uniform_policy
from medsim.envs.vector import TreatmentVectorEnv
from medsim.world import meddreamer
from medsim.world.bedside import AtBedside, dreamer_text, latent_episodes, load_dreamer, save_dreamer
from medsim.world.charts import Charts, Windows
from medsim.world.doubt import Doubt, charged
from medsim.world.imagination import ActorConfig, ActorCritic, ImagineConfig, width
from medsim.world.learning import Descent, train_world
from medsim.world.meddreamer import (
    Dreamer,
    MedDreamer,
    Phase,
    hybrid_losses,
    hybrid_returns,
    imagined_losses,
    last_open,
    states_of,
    train_meddreamer,
    whole,
)
from medsim.world.world_model import small

torch.set_num_threads(1)
TOY = Episodes.example(60, seed=2)
CHARTS = Charts.of(TOY)
FEW = Descent(steps=4, batch=4, length=6, rate=1e-3, validate_every=2)
ON = Phase(replace(FEW, select=False), ImagineConfig(horizon=2), 0.1)
SMALL = small(memory=16, hidden=16, groups=4, classes=4, units=16, k=4)
CONFIG = MedDreamer(SMALL, FEW, FEW, ActorConfig(units=16), ON, ON, floor=0.1)


@pytest.fixture(scope="module")
def dreamer() -> Dreamer: return train_meddreamer(CHARTS, CONFIG, progress=False)[0]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**20), st.floats(0, 1), st.floats(0, 1))
def test_a_hybrid_return_is_one_recursion_over_rows_and_steps(n: int, more: int, seed: int, gamma: float, lam: float):
    gen = torch.Generator().manual_seed(seed)
    reward, goes_on, value = (torch.rand(1, n + more, generator=gen, dtype=torch.double) for _ in range(3))
    after = torch.rand(1, generator=gen, dtype=torch.double)
    found = hybrid_returns(reward, goes_on, value, torch.arange(n + more)[None] < n, after, gamma, lam)
    r = after.item()
    for t in reversed(range(1, n)):
        r = reward[0, t] + gamma * goes_on[0, t] * ((1 - lam) * value[0, t] + lam * r)
        torch.testing.assert_close(found[0, t - 1], torch.as_tensor(r, dtype=torch.double))
    assert (found[0, n - 1 :] == after).all()


def test_steps_are_imagined_from_the_last_row_that_did_not_end_the_stay(dreamer: Dreamer):
    rows = CHARTS.rows(np.arange(60), np.zeros(60, int), 9)  # some stays end in these windows, others go on
    states, found = states_of(dreamer.model, rows), last_open(states_of(dreamer.model, rows), rows)
    assert 0 < rows.ended.any(1).sum() < len(rows.mask)
    for i, n in enumerate(rows.mask.sum(1).tolist()):
        assert torch.equal(found.h[i], states.h[i, n - 1 - int(rows.ended[i, n - 1])])


def test_nothing_follows_the_row_that_ended_a_stay(dreamer: Dreamer, monkeypatch: pytest.MonkeyPatch):
    rows = CHARTS.rows(np.arange(60), np.zeros(60, int), 9)
    ends = rows.ended.any(1)
    assert 0 < ends.sum() < 60
    asked, returns = [], ImagineConfig(horizon=2, gamma=1.0, lam=1.0)

    def kept(reward, goes_on, value, mask, after, gamma, lam):
        asked.append(hybrid_returns(reward, goes_on, value, mask, after, gamma, lam))
        asked.append(hybrid_returns(reward, goes_on, value, mask, after + 100.0, gamma, lam))
        return asked[0]

    monkeypatch.setattr(meddreamer, "hybrid_returns", kept)
    hybrid_losses(dreamer, rows, returns, torch.Generator().manual_seed(0))
    moved = ((asked[1] - asked[0]) * (rows.chosen[:, :-1] >= 0)).abs().amax(1)
    assert (moved[ends] == 0).all() and (moved[~ends] > 1).all()


def test_both_phases_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    once, told = train_meddreamer(CHARTS, CONFIG, seed=3, progress=False)
    for phase in ("hybrid", "imagined"):
        folder, calls = tmp_path / phase, iter(range(99))

        losses = getattr(meddreamer, f"{phase}_losses")

        def stops(*given, losses=losses, calls=calls):
            if next(calls) == 3: raise KeyboardInterrupt
            return losses(*given)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(meddreamer, f"{phase}_losses", stops)
            train_meddreamer(CHARTS, CONFIG, seed=3, progress=False, checkpoint=folder)
        again, later = train_meddreamer(CHARTS, CONFIG, seed=3, progress=False, checkpoint=folder)
        assert all(torch.equal(x, again.state_dict()[n]) for n, x in once.state_dict().items())
        assert all(told[n].equals(later[n]) for n in told)
    with pytest.raises(ValueError, match="another run"):
        train_meddreamer(CHARTS, replace(CONFIG, floor=0.2), seed=4, progress=False, checkpoint=folder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_learning_elsewhere():
    dreamer, told = train_meddreamer(CHARTS, CONFIG, progress=False, device="cuda")
    assert all(x.device.type == "cpu" for x in dreamer.state_dict().values())
    assert all(np.isfinite(h.loss).all() for h in told.values())


def test_the_world_stands_still_and_only_the_policy_learns(dreamer: Dreamer):
    rows, gen = Windows(CHARTS, 6).batch(torch.tensor(0), 0, 8), torch.Generator().manual_seed(0)
    for losses in (hybrid_losses, imagined_losses):
        dreamer.zero_grad()
        losses(dreamer, rows, ON.asked, gen)["loss"].backward()
        moved = {n.split(".")[0] + "." + n.split(".")[1] for n, p in dreamer.named_parameters() if p.grad is not None}
        assert moved == {"agent.actor", "agent.critic"}


def test_only_the_likely(dreamer: Dreamer):
    limited = Dreamer(dreamer.model, ActorConfig(units=16, floor=0.5), least=0.05)
    p, theirs = limited.probs(CHARTS), limited.probs(CHARTS, of="clone")
    may = theirs >= 0.05
    may |= np.eye(25, dtype=bool)[theirs.argmax(-1)] & ~may.any(-1, keepdims=True)
    assert (p[CHARTS.mask][~may[CHARTS.mask]] < 1e-8).all() and np.allclose(p.sum(-1), 1, atol=1e-5)
    floors = 0.5 / may.sum(-1)
    assert (p[CHARTS.mask][may[CHARTS.mask]] >= floors[CHARTS.mask].repeat(may[CHARTS.mask].sum(-1)) - 1e-6).all()


def test_doubt_is_paid_and_needs_two():
    model, _ = train_world(CHARTS, SMALL, FEW, progress=False)
    d = Dreamer(model, ActorConfig(units=16))
    start = states_of(model, whole(CHARTS)).at((slice(None), 0))
    seen = [d.dream(start, ImagineConfig(horizon=2, doubt=x), torch.Generator().manual_seed(0))[0] for x in (0.0, 2.0)]
    assert torch.equal(seen[0].action, seen[1].action) and (seen[1].reward < seen[0].reward).all()
    torch.testing.assert_close(charged(seen[0], d.doubt, 2.0).reward, seen[1].reward)
    with pytest.raises(ValueError, match="disagree"): Doubt(4, 2, 4, members=1)


def test_the_scale_of_advantages():
    returns = torch.linspace(0, 100, 101)
    assert width(returns, ImagineConfig(scale="range")) == 90 and width(returns, ImagineConfig()) == 1
    assert width(returns / 1e4, ImagineConfig(scale="range")) == 1


def test_what_is_no_number_is_named_before_anything_is_learned():
    bad = CHARTS.reward.copy()
    bad[7, 1] = np.nan
    with pytest.raises(ValueError, match=f"reward: 1 .* stay_id {CHARTS.ids.stay_id[7]}"): replace(CHARTS, reward=bad)


@pytest.mark.parametrize(("changes", "what"), [
    ({"hybrid": None, "imagined": None}, "one phase"), ({"least": 1.0}, "least"), ({"floor": -0.1}, "floor")])
def test_settings_that_cannot_be(changes: dict, what: str):
    with pytest.raises(ValueError, match=what): replace(CONFIG, **changes)


def test_stays_of_one_row_and_one_decision():
    mask = TOY.mask & (np.arange(TOY.mask.shape[1]) < 1)
    short = replace(TOY, mask=mask, terminated=mask, truncated=np.zeros_like(mask))
    charts = Charts.of(short)
    dreamer, told = train_meddreamer(charts, CONFIG, progress=False)
    assert np.isfinite(told["imagined"].loss).all() and dreamer.probs(charts).shape == (60, charts.mask.shape[1], 25)


# ---- at the bedside, and kept


def wards(budget: int = 4) -> TreatmentVectorEnv:
    return TreatmentVectorEnv(sepsis().select(range(3)), 2, timing="fixed", budget=budget, horizon_h=24.0,
                              observation="partial", backend="pinn", discrete=True)


@pytest.fixture(scope="module")
def log() -> Episodes:
    e = rollout(wards(), uniform_policy(wards()), 3, seed=0)
    return replace(e, ids=e.ids.assign(fold=np.resize(["train", "train", "val"], len(e.ids))))


CLOCKS = ("hours_left", "decisions_left")


@pytest.mark.parametrize("form", ["direct", "paper", "grud", "mlp"])
def test_the_bedside_is_the_chart(log: Episodes, form: str):
    charts = Charts.of(log, without=CLOCKS)
    model, _ = train_world(charts, replace(SMALL, form=form), FEW, progress=False)
    agent = ActorCritic(model.rssm.config.n_features, 125, ActorConfig(units=16))
    with torch.no_grad(): agent.actor.weight[-1].mul_(100)  # choices that depend on the state
    bed = AtBedside(model, agent, log)
    treated = rollout(wards(), bed, 2, seed=1)
    features = states_of(model, whole(Charts.of(treated, without=CLOCKS))).features[:, :4]
    with torch.no_grad(): p = agent.log_probs(features).exp().numpy()
    assert p.std(0).max() > 1e-3
    taken = np.take_along_axis(p, treated.action[..., None], -1)[..., 0]
    np.testing.assert_allclose(treated.behaviour_prob, taken, rtol=1e-4)
    sure = rollout(wards(), AtBedside(model, agent, log, greedy=True), seed=1)
    features = states_of(model, whole(Charts.of(sure, without=CLOCKS))).features[:, :4]
    with torch.no_grad(): assert (agent.log_probs(features).argmax(-1).numpy() == sure.action).all()


def test_beds_that_begin_anew_one_by_one(log: Episodes):
    charts = Charts.of(log, without=CLOCKS)
    model, _ = train_world(charts, SMALL, FEW, progress=False)
    agent = ActorCritic(model.rssm.config.n_features, 125, ActorConfig(units=16))
    bed, alone = AtBedside(model, agent, log), AtBedside(model, agent, log)
    obs = [torch.as_tensor(log.obs[:2, t]) for t in range(4)]
    for t in range(3): bed.act(obs[t], deterministic=True)
    bed.act(torch.stack([obs[3][0], obs[0][1]]), deterministic=True)  # the second bed has a new patient
    alone.act(obs[0], deterministic=True)
    torch.testing.assert_close(bed.log_p[1], alone.log_p[1])


def test_latent_states_as_features(log: Episodes):
    charts = Charts.of(log, without=CLOCKS)
    model, _ = train_world(charts, SMALL, FEW, progress=False)
    e, states = latent_episodes(model, log), states_of(model, whole(charts)).features.numpy()
    np.testing.assert_array_equal(e.obs, states[:, :-1])
    np.testing.assert_array_equal(e.final_obs, states[:, -1])
    assert e.ids.equals(log.ids) and np.array_equal(e.reward, log.reward)


def test_its_card_lies_beside_it(dreamer: Dreamer, tmp_path: Path):
    one = pd.DataFrame({"estimator": ["WIS"], "value": [-3.0], "ci_low": [-4.0], "ci_high": [-2.0], "ess": [1.1],
                        "n": [30], "flag": ["ESS 1 below 50"]})
    risk = pd.DataFrame([dict.fromkeys(NEEDS["safety"], "")])
    flow = pd.DataFrame({"step": ["virtual stays"], "excluded": [0], "left": [len(TOY)]})
    card = Card("A dreamer", "Nobody's charts.", flow, TOY.summary(), one, risk)
    text = dreamer_text(dreamer, TOY, card, {"steps": 20})
    save_dreamer(dreamer, tmp_path / "d", TOY.action_spec, card=text)
    assert (tmp_path / "d" / "README.md").read_text(encoding="utf-8") == text
    assert NOTICE in text and "- steps: 20\n" in text and TOY.data_hash() in text and "AtBedside" in text
    assert f"it reads {', '.join(dreamer.model.names)}," in text
    load_dreamer(tmp_path / "d")


def test_kept_and_loaded_or_refused(dreamer: Dreamer, tmp_path: Path):
    save_dreamer(dreamer, tmp_path / "d", TOY.action_spec, {"of": "a toy"})
    again, actions, meta = load_dreamer(tmp_path / "d")
    assert np.array_equal(again.probs(CHARTS), dreamer.probs(CHARTS))
    assert actions == TOY.action_spec and meta == {"of": "a toy"}
    with pytest.raises(FileExistsError): save_dreamer(dreamer, tmp_path / "d", TOY.action_spec)
    file = tmp_path / "d" / "model.safetensors"
    assert not (tmp_path / "d" / "README.md").exists()
    tensors = load_file(file)
    save_file({n: x + 1 for n, x in tensors.items()}, file)
    with pytest.raises(ValueError, match="torn, or was changed"): load_dreamer(tmp_path / "d")
    with pytest.raises(FileNotFoundError): load_dreamer(tmp_path / "nothing")
