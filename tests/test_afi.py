"The encoders of an irregular row: formulas against explicit sums, seeds, refusals, what the inputs can tell apart."

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsim.world.afi import (
    AFI,
    ENCODERS,
    CarryDecoder,
    GRUDDecay,
    Inputs,
    encoder,
    fm,
    fm_linear,
    log_hours,
    saturated,
)


def rows(n: int = 50, d: int = 5, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    value, seen = torch.randn(n, d, generator=g), torch.rand(n, d, generator=g) < 0.3
    delta = torch.empty(n, d).exponential_(generator=g) * 10
    never = (torch.rand(n, d, generator=g) < 0.1) & ~seen
    fresh = torch.where(seen, 0.0, delta).masked_fill(never, torch.inf)
    return Inputs(value.masked_fill(never, 0.0), seen, delta, fresh)


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 5), st.integers(0, 100))
def test_fm_is_the_sum_over_pairs(d: int, p: int, c: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(3, d, p, generator=g).double(), torch.randn(d, p, c, generator=g).double()
    e = (x[..., None] * w).sum(-2)
    pairs = sum((e[:, i] * e[:, j] for i, j in combinations(range(d), 2)), torch.zeros(3, c).double())
    assert torch.allclose(fm(e), pairs) and torch.allclose(fm_linear(x, w), pairs)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_finite_seeded_and_leaves_the_global_generator_alone(name: str) -> None:
    state = torch.get_rng_state()
    x, one, again = rows(), encoder(name, 5, 8, seed=4), encoder(name, 5, 8, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    out = one(x)
    assert out.shape == (50, one.width) and out.isfinite().all() and torch.equal(out, again(x))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters())
    batch = Inputs(*(part.view(5, 10, 5) for part in x))
    assert torch.allclose(one(batch).view(50, -1), out, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_do_not_see_each_other(name: str) -> None:
    x, net = rows(), encoder(name, 5, 8)
    changed = x._replace(value=torch.cat([x.value[:-1], x.value[-1:] + 5]))
    assert torch.equal(net(x)[:-1], net(changed)[:-1]) and not torch.equal(net(x)[-1], net(changed)[-1])


@pytest.mark.parametrize("name", ENCODERS)
def test_bad_inputs_are_refused_by_name(name: str) -> None:
    names, x = ["hr", "map", "lactate", "ph", "wbc"], rows()
    net = encoder(name, 5, 8, names=names)
    bad = x.value.clone()
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match="lactate"): net(x._replace(value=bad))
    endless = torch.where(torch.arange(5) == 3, torch.inf, x.delta)
    with pytest.raises(ValueError, match="delta: ph"): net(x._replace(delta=endless))
    with pytest.raises(ValueError, match="5 features"): net(rows(d=4))
    with pytest.raises(ValueError, match="freshness: shape"): net(x._replace(freshness=x.freshness[:2]))


def test_settings_are_refused() -> None:
    for wrong in (dict(form="fm"), dict(hours="days"), dict(k=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))): AFI(3, **wrong)
    with pytest.raises(ValueError, match="paper, shared"): encoder("lstm", 3)


def test_only_mask_and_freshness_tell_new_from_carried() -> None:
    old = torch.full((1, 5), 6.0)
    x = rows(1)._replace(observed=torch.zeros(1, 5).bool(), freshness=old, delta=old)
    new = x._replace(observed=torch.ones(1, 5).bool(), freshness=torch.zeros(1, 5))
    for form in ("paper", "shared", "cross", "direct"):
        same = torch.equal(AFI(5, form=form)(x), AFI(5, form=form)(new))
        assert same == (form in ("paper", "shared"))


def test_raw_hours_saturate_the_shared_form() -> None:
    x = rows(500, 36)
    raw, log = (saturated(AFI(36, form="shared", hours=h)(x), 32) for h in ("raw", "log"))
    assert raw > 0.9 > 0.3 > log


def test_hours_and_decay() -> None:
    assert log_hours(torch.tensor([0.0, 24.0])).tolist() == pytest.approx([0, 1])
    assert log_hours(torch.tensor(torch.inf)) == log_hours(torch.tensor(240.0))
    x = rows()._replace(observed=torch.zeros(50, 5).bool())
    assert (GRUDDecay(5)(x)[:, :5].abs() <= x.value.abs()).all()


def test_the_carry_term() -> None:
    x, latent = rows(), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    plain, carry = CarryDecoder(3, 5, carry=False, seed=1), CarryDecoder(3, 5, seed=1)
    added = carry(latent, x.value, x.freshness) - plain(latent, x.value, x.freshness)
    expected = 0.9 * torch.exp(-0.02 * x.freshness.clamp(max=1e4)) * x.value
    assert torch.allclose(added, expected, atol=1e-5)
    carry(latent, x.value, x.freshness).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in carry.parameters())
