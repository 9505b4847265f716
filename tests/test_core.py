"Properties of the core floor that a single example in a notebook cannot show."

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from medsim.core import nets, paths, scale, seeding, stats, types

keys = st.lists(st.one_of(st.integers(), st.text()), max_size=4)
subjects = st.lists(st.integers(0, 10**8), min_size=1, max_size=60)

# ---- seeding


@given(st.integers(), keys, keys)
def test_spawn_gives_one_seed_to_one_name(seed, a, b):
    assert 0 <= seeding.spawn(seed, *a) < 2**63
    assert (seeding.spawn(seed, *a) == seeding.spawn(seed, *b)) == (a == b)


def test_spawn_is_the_same_in_another_process_with_another_hash_seed():
    code = "from medsim.core.seeding import spawn; print(spawn(3, 'ppo', 7))"
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert int(out.stdout) == seeding.spawn(3, "ppo", 7)


@given(subjects, st.randoms(use_true_random=False), st.integers(0, 5))
def test_fold_of_a_subject_depends_on_that_subject_alone(ids, random, seed):
    fold = dict(zip(ids, seeding.subject_fold(ids, seed=seed), strict=True))
    some = random.sample(ids, k=random.randint(1, len(ids)))
    assert [fold[i] for i in some] == seeding.subject_fold(some, seed=seed).tolist()


@pytest.mark.parametrize("kind", ["int64", "Int64", "str", "object", "category"])
def test_fold_does_not_depend_on_the_type_of_the_column(kind):
    ids = pd.Series(range(10_000, 10_200))
    column = ids.astype(str) if kind == "str" else ids.astype(kind)
    assert (seeding.subject_fold(column) == seeding.subject_fold(ids)).all()


def test_fold_shares_are_near_their_fractions_and_extremes_are_exact():
    fold = seeding.subject_fold(range(20_000))
    share = pd.Series(fold).value_counts(normalize=True)
    assert np.allclose(share[["train", "val", "test"]], [0.7, 0.15, 0.15], atol=0.01)
    assert set(seeding.subject_fold(range(500), (0, 1, 0))) == {"val"}
    assert len(seeding.subject_fold([])) == 0


@pytest.mark.parametrize("ids", [[1, None], ["a", None], [1.0, 2.0], [1.0, np.nan]])
def test_fold_refuses_missing_and_fractional_ids(ids):
    with pytest.raises(ValueError, match="subject id"):
        seeding.subject_fold(ids)


def test_no_global_generator_is_touched():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    seeding.subject_fold(range(50))
    rng, g = seeding.generators(0, "x")
    rng.normal(), torch.rand(3, generator=g)
    stats.bootstrap(np.arange(9.0), np.mean, n_boot=20)
    nets.Categorical(nets.MLP(nets.MLPConfig((2, 4, 3)), range(3))(torch.zeros(3, 2))).sample(g)
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


# ---- scale and paths


def test_scale_reads_the_variable(monkeypatch):
    monkeypatch.setenv("MEDSIM_SCALE", "paper")
    assert scale.scale() == "paper" and scale.choose(smoke=1, paper=2) == 2
    monkeypatch.delenv("MEDSIM_SCALE")
    assert scale.scale() == "smoke" and scale.choose(smoke=1, paper=2) == 1
    monkeypatch.setenv("MEDSIM_SCALE", "huge")
    with pytest.raises(ValueError, match="huge.*smoke.*paper"):
        scale.choose(smoke=1, paper=2)


def test_demo_is_found_under_the_variable_and_sample_is_the_fallback(monkeypatch, tmp_path):
    (tmp_path / "mimic-iv-demo").mkdir()
    (tmp_path / "eicu-demo").write_text("a file, not a folder")
    monkeypatch.setenv("MEDSIM_DATA", str(tmp_path))
    assert paths.data_folder("mimic-iv-demo") == tmp_path / "mimic-iv-demo"
    assert paths.data_folder("eicu-demo") is None
    folder, sentence = paths.demo_or_sample("mimic-iv-demo")
    assert folder == tmp_path / "mimic-iv-demo" and "PhysioNet, ODbL" in sentence

    sample = tmp_path / "sample"
    monkeypatch.setattr(paths, "sample_folder", lambda: sample)
    folder, sentence = paths.demo_or_sample("eicu-demo")
    assert folder == sample and "synthetic" in sentence and str(tmp_path) not in sentence
    monkeypatch.delenv("MEDSIM_DATA")
    assert paths.data_folder("mimic-iv-demo") is None
    assert "not set" in paths.demo_or_sample("mimic-iv-demo")[1]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_folder_leaves_nothing_behind(tmp_path, failure):
    with pytest.raises(failure):
        with paths.atomic_folder(tmp_path / "out") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "a").write_text("a")
            raise failure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.touch, lambda p: p.symlink_to("nowhere")])
def test_atomic_folder_refuses_what_is_not_an_empty_folder(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(ValueError, match="out"):
        with paths.atomic_folder(tmp_path / "out"):
            raise AssertionError("not reached")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_folder_never_replaces_what_came_meanwhile(tmp_path):
    with pytest.raises(FileExistsError):
        with paths.atomic_folder(tmp_path / "out") as folder:
            (folder / "mine").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/theirs"]


def test_atomic_folder_takes_relative_paths_and_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with paths.atomic_folder("a/b") as folder:
        (folder / "x").touch()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "a" / "b" / "x").exists()


def test_write_text_is_whole_or_absent(tmp_path):
    paths.write_text_atomic(tmp_path / "new" / "a.json", "é\n")
    assert (tmp_path / "new" / "a.json").read_bytes() == "é\n".encode()
    with pytest.raises(ValueError, match="overwrite"):
        paths.write_text_atomic(tmp_path / "new" / "a.json", "b")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]


# ---- stats


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(0, 9))
def test_resample_takes_whole_groups(labels, seed):
    group = pd.factorize(np.array(labels))[0]
    for rows in stats.resamples(group, 3, np.random.default_rng(seed)):
        times = np.bincount(rows, minlength=len(group))
        drawn = [set(times[group == g]) for g in range(group.max() + 1)]
        assert all(len(d) == 1 for d in drawn)
        assert sum(d.pop() for d in drawn) == group.max() + 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.sampled_from(["percentile", "bca"]))
@settings(max_examples=30)
def test_interval_of_the_mean_lies_within_the_data(values, method):
    found = stats.bootstrap(np.array(values), np.mean, n_boot=50, method=method)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.n == found.n_groups == len(values)


def test_bootstrap_does_not_depend_on_the_names_of_groups():
    x, g = np.random.default_rng(0).normal(size=90), np.repeat(np.arange(30), 3)
    first = stats.bootstrap(x, np.mean, groups=g)
    assert first == stats.bootstrap(x, np.mean, groups=[f"patient {i}" for i in g])
    assert first.n_groups == 30 and first.n == 90


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(40), 10)
    x = rng.normal(size=40)[g] + 0.1 * rng.normal(size=400)
    rows, patients = stats.bootstrap(x, np.mean), stats.bootstrap(x, np.mean, groups=g)
    expected = np.sqrt(10)  # ten nearly equal rows a patient
    ratio = (patients.high - patients.low) / (rows.high - rows.low)
    assert 0.8 * expected < ratio < 1.2 * expected


def test_bootstrap_refuses_missing_groups():
    with pytest.raises(ValueError, match="row 2"):
        stats.bootstrap(np.arange(3.0), np.mean, groups=pd.Series(["a", "b", None]))
    with pytest.raises(ValueError, match="at least 2"):
        stats.bootstrap(np.array([]), np.mean)


def test_paired_difference_of_a_series_with_itself_is_zero():
    x = np.random.default_rng(0).normal(size=20)
    zero = stats.paired_difference(x, x, groups=np.arange(20) // 2)
    assert (zero.value, zero.low, zero.high, zero.n_groups) == (0, 0, 0, 10)
    with pytest.raises(ValueError, match="pairs"):
        stats.paired_difference(x, x[1:])


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_value_and_mirrors(pair):
    k, n = pair
    found, mirror = stats.wilson(k, n), stats.wilson(n - k, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert np.allclose([1 - found.high, 1 - found.low], [mirror.low, mirror.high], atol=1e-12)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50), st.floats(1e-6, 1e6))
def test_ess_lies_between_one_and_n_and_ignores_scale(weights, factor):
    ess = stats.ess_kish(weights)
    assert 1 - 1e-9 <= ess <= len(weights) + 1e-9
    assert np.isclose(ess, stats.ess_kish(np.array(weights) * factor))


# ---- types


def test_shapes_are_checked_in_tests_and_not_in_use(monkeypatch):
    def move(x: types.State, dt: types.PerCopy) -> types.State:
        return x + dt[..., None]

    with pytest.raises(TypeCheckError):
        types.checked(move)(torch.zeros(2, 3, 6), torch.zeros(3))
    monkeypatch.delenv("MEDSIM_CHECK_TYPES")
    assert types.checked(move) is move


# ---- nets


@pytest.mark.parametrize("activation", nets.ACTIVATIONS)
@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("lead", [(), (7,), (2, 5)])
def test_stack_is_its_members(activation, layernorm, lead):
    config = nets.MLPConfig((4, 8, 6, 3), activation, layernorm)
    together = nets.MLP(config, [5, 1, 5]).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases, scales and shifts away from their beginnings
        for p in together.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    x = torch.randn(3, *lead, 4, generator=g).double()
    together(x).pow(2).sum().backward()
    for k in range(3):
        alone = nets.unstack(together, k)
        y = alone(x[k])
        y.pow(2).sum().backward()
        assert torch.allclose(y, together(x)[k])
        for p, q in zip(alone.parameters(), together.parameters(), strict=True):
            assert p.grad.abs().max() > 0 and torch.allclose(p.grad, q.grad[k])


def test_member_begins_as_the_plain_network_of_its_seed():
    config = nets.MLPConfig((4, 8, 3), layernorm=True)
    together = nets.MLP(config, (9, 2))
    for k, seed in enumerate((9, np.int64(2))):
        pairs = zip(nets.unstack(together, k).parameters(), nets.MLP(config, seed).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_stack_and_unstack_copy():
    plain = [nets.MLP(nets.MLPConfig((2, 3, 1)), s) for s in range(2)]
    together = nets.stack(plain)
    with torch.no_grad():
        together.weight[0].zero_()
    assert plain[0].weight[0].abs().sum() > 0
    with pytest.raises(ValueError, match="one configuration"):
        nets.stack([plain[0], nets.MLP(nets.MLPConfig((2, 4, 1)))])
    with pytest.raises(ValueError, match="no member 2"):
        nets.unstack(together, 2)


def test_stack_keeps_its_dtype():
    double = nets.MLP(nets.MLPConfig((2, 3, 1)), range(2)).double()
    assert nets.unstack(double, 1).weight[0].dtype == torch.float64
    assert nets.stack([nets.unstack(double, k) for k in range(2)]).weight[0].dtype == torch.float64


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=8))
def test_categorical_agrees_with_torch(logits):
    ours = nets.Categorical(torch.tensor(logits))
    theirs = torch.distributions.Categorical(logits=torch.tensor(logits))
    assert torch.allclose(ours.entropy(), theirs.entropy(), atol=1e-5)
    action = torch.tensor(len(logits) - 1)
    assert torch.allclose(ours.log_prob(action), theirs.log_prob(action), atol=1e-5)
    assert torch.allclose(ours.probs.sum(), torch.tensor(1.0))


def test_categorical_samples_are_reproducible_and_allowed():
    logits = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0))
    logits[..., 2] = -torch.inf
    draws = [nets.Categorical(logits).sample(torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].shape == (4, 9) and not (draws[0] == 2).any()


@given(st.floats(-2, 2), st.floats(-3, 1), st.floats(-5, 5), st.floats(0.1, 50))
@settings(max_examples=50)
def test_squashed_gaussian_agrees_with_torch(mean, log_std, low, width):
    from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

    m, s = torch.tensor([mean]).double(), torch.tensor([log_std]).double()
    ours = nets.SquashedGaussian(m, s, low, low + width)
    moves = [TanhTransform(), AffineTransform(low + width / 2, width / 2)]
    theirs = TransformedDistribution(Normal(m, s.exp()), moves)
    action, log_prob = ours.sample_with_log_prob(torch.Generator().manual_seed(0))
    assert low <= action.item() <= low + width
    if abs(2 * (action.item() - low) / width - 1) < 1 - 1e-9:  # near a bound the inverse loses digits
        assert torch.allclose(ours.log_prob(action), log_prob, atol=1e-3)
        assert torch.allclose(theirs.log_prob(action).sum(-1), log_prob, atol=1e-3)


def test_squashed_gaussian_gradients_are_finite_at_the_bounds():
    mean = torch.tensor([[50.0, -50.0]], requires_grad=True)
    head = nets.SquashedGaussian(mean, torch.zeros(1, 2))
    action, log_prob = head.sample_with_log_prob(torch.Generator().manual_seed(0))
    (log_prob.sum() + head.entropy().sum() + head.log_prob(torch.tensor([[1.0, -1.0]])).sum()).backward()
    assert action.isfinite().all() and log_prob.isfinite().all() and mean.grad.isfinite().all()


def test_one_action_dimension_stays_within_its_own_bounds():
    out = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)) * 5
    low, high = torch.tensor([0.0, -10.0]), torch.tensor([1.0, 10.0])
    action = nets.squashed_gaussian(out, low, high).sample(torch.Generator().manual_seed(1))
    assert ((low <= action) & (action <= high)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_network_begins_the_same_on_a_gpu():
    config = nets.MLPConfig((4, 8, 3))
    gpu, cpu = nets.MLP(config, range(3), device="cuda"), nets.MLP(config, range(3))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gpu.parameters(), cpu.parameters(), strict=True))
    g = seeding.generators(0, device="cuda")[1]
    assert nets.Categorical(gpu(torch.zeros(3, 5, 4, device="cuda"))).sample(g).shape == (3, 5)
