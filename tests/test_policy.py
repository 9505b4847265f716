"Policies that travel: kept, found again, carried to other data, and whatever is wrong with them said."

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from medsim.agents import bc
from medsim.agents.confined import GuardedPolicy, LikelyPolicy
from medsim.agents.many import joined
from medsim.agents.network import load_network
from medsim.agents.policy import AVERAGE, Actions, PolicyConfig, StackedPolicy, choices, decode_action, load_policy
from medsim.agents.signature import Signature
from medsim.agents.support import SupportConfig, support_of
from medsim.agents.ward import seeds_of
from medsim.data.episodes import Episodes
from medsim.ope.estimate import evaluate

CLONING = bc.BC(steps=20, batch=16, hidden=(8, 8), validate_every=20)


@pytest.fixture(scope="module")
def toy() -> Episodes: return Episodes.example()


@pytest.fixture(scope="module")
def clone(toy: Episodes) -> StackedPolicy: return bc.train(toy, CLONING, seed=3, progress=False).policy


@pytest.fixture
def kept(clone: StackedPolicy, tmp_path: Path) -> Path:
    clone.save(tmp_path / "clone", {"note": 1})
    return tmp_path / "clone"


# ---- kept and found again


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("spread", ["free", "state"])
@pytest.mark.parametrize("actions", [Actions(True, 3), Actions(False, 2, (0.0, -1.0), (1.0, 2.0))])
def test_policy_survives_saving(actions: Actions, spread: str, k: int, tmp_path: Path):
    config = PolicyConfig(4, actions, (8, 5), "silu", spread)  # type: ignore[arg-type]
    policy, obs = StackedPolicy(config, list(range(k))), torch.randn(6, 4)
    policy.save(tmp_path / "p", {"note": 1})
    again = load_policy(tmp_path / "p")
    assert again.config == policy.config and again.k == k
    assert torch.equal(again.act(obs, deterministic=True), policy.act(obs, deterministic=True))
    with pytest.raises(FileExistsError): policy.save(tmp_path / "p")
    with pytest.raises(ValueError, match="not JSON compliant|NaN|nan"): policy.save(tmp_path / "q", {"x": float("nan")})
    assert not (tmp_path / "q").exists()


def test_a_fresh_process_acts_the_same(clone: StackedPolicy, kept: Path, toy: Episodes):
    obs = torch.as_tensor(toy.obs[toy.mask][:200])
    save_file({"obs": obs}, kept.parent / "obs.safetensors")
    code = ("import sys, torch; from pathlib import Path; from safetensors.torch import load_file, save_file\n"
            "from medsim.agents.policy import load_policy; there = Path(sys.argv[1])\n"
            "p, obs = load_policy(there / 'clone'), load_file(there / 'obs.safetensors')['obs']\n"
            "g = torch.Generator().manual_seed(1)\n"
            "save_file({'best': p.act(obs, deterministic=True), 'drawn': p.act(obs, generator=g), 'p': p.probs(obs)},"
            " there / 'out.safetensors')")
    subprocess.run([sys.executable, "-c", code, str(kept.parent)], check=True)
    out = load_file(kept.parent / "out.safetensors")
    assert torch.equal(out["best"], clone.act(obs, deterministic=True)) and torch.equal(out["p"], clone.probs(obs))
    assert torch.equal(out["drawn"], clone.act(obs, generator=torch.Generator().manual_seed(1)))


def test_the_folder_says_what_the_policy_is(clone: StackedPolicy, kept: Path, toy: Episodes):
    about = json.loads((kept / "config.json").read_text())
    assert (about["state_dim"], about["n_actions"], about["hidden_sizes"]) == (2, 25, [8, 8])
    (signature,) = about["signatures"]
    assert [f["name"] for f in signature["features"]] == list(toy.feature_names)
    assert signature["actions"]["vasopressor_edges"] == list(toy.action_spec.vasopressor_edges)  # type: ignore[attr-defined]
    assert signature["data_hash"] == toy.data_hash() and signature["alignment"] == toy.alignment
    assert about["origin"]["learner"] == "BC" and about["origin"]["seeds"] == [*seeds_of(3, 1)]
    assert {n: tuple(x.shape) for n, x in load_file(kept / "model.safetensors").items()} == {
        "net.0.weight": (8, 2), "net.0.bias": (8,), "net.2.weight": (8, 8), "net.2.bias": (8,),
        "net.4.weight": (25, 8), "net.4.bias": (25,)}
    assert load_policy(kept).signatures == clone.signatures == (Signature.of(toy),)


def torch_network(sizes: tuple[int, ...]) -> torch.nn.Sequential:
    parts: list[torch.nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True): parts += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*parts[:-1])


def test_plain_torch_reads_what_we_write(clone: StackedPolicy, kept: Path):
    net, obs = torch_network((2, 8, 8, 25)), torch.randn(50, 2)
    net.load_state_dict({n.removeprefix("net."): x for n, x in load_file(kept / "model.safetensors").items()})
    torch.testing.assert_close(net(obs).softmax(-1), clone.probs(obs))


def resaved(weights: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        save_file(weights(load_file(path / "model.safetensors")), path / "model.safetensors")
    return change


def rewritten(edit: Callable[[dict], None], seal: bool = False) -> Callable[[Path], None]:
    "Edit config.json; `seal`: as somebody would who makes it whole again."
    def change(path: Path) -> None:
        from medsim.agents.policy import seal_of

        about = json.loads((path / "config.json").read_text())
        edit(about)
        if seal:
            about.pop("sha256")
            about["sha256"] = seal_of(about, (path / "model.safetensors").read_bytes())
        (path / "config.json").write_text(json.dumps(about))
    return change


def cut(name: str, at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None: (path / name).write_bytes((path / name).read_bytes()[:at])
    return change


def reorder(about: dict) -> None: about["signatures"][0]["features"].reverse()
def unname(about: dict) -> None: del about["signatures"][0]["features"]
def forget_unit(about: dict) -> None: del about["signatures"][0]["features"][0]["unit"]
def other_unit(about: dict) -> None: about["signatures"][0]["features"][1]["unit"] = "mg/dL"
def rename(about: dict) -> None: about["kind"] = "Tree"
def more(about: dict) -> None: about["policies"] = 2
def wider(about: dict) -> None: about["hidden_sizes"] = [9, 8]


@pytest.mark.parametrize(("change", "message"), [
    (cut("model.safetensors", -20), "clone: model.safetensors is torn"),
    (cut("model.safetensors", 0), "clone: model.safetensors is torn"),
    (cut("config.json", -20), "clone: config.json is torn"),
    (resaved(lambda t: {**t, "net.0.bias": t["net.0.bias"] + 1e-7}), "model.safetensors is torn, or was changed"),
    (rewritten(reorder), "config.json is torn, or was changed"),
    (rewritten(other_unit), "config.json is torn, or was changed"),
    (rewritten(unname), "config.json is torn, or was changed"),
    (rewritten(unname, seal=True), "signature: lacks features"),
    (rewritten(forget_unit, seal=True), "feature 0: lacks unit"),
    (rewritten(rename), "a 'Tree' of version 2"),
    (rewritten(more, seal=True), "weights do not fit"),
    (rewritten(wider, seal=True), "weights do not fit"),
    (lambda path: (path / "config.json").write_text("[1]"), "what can be read here is"),
], ids=[
    "cut weights", "no weights", "cut config", "other weight", "reordered", "other unit", "unnamed",
    "unnamed and sealed", "no unit and sealed", "other kind", "more policies", "wider", "a list",
])
def test_what_was_changed_or_torn_is_refused(kept: Path, change: Callable[[Path], None], message: str):
    change(kept)
    with pytest.raises(ValueError, match=message): load_policy(kept)


def test_what_is_not_there_is_said(kept: Path):
    (kept / "model.safetensors").rename(kept / "policy.pt")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors.*policy.pt may be .*load_network"):
        load_policy(kept)
    with pytest.raises(FileNotFoundError, match="nowhere: no config.json"): load_policy(kept.parent / "nowhere")


def test_members_and_stacks_keep_their_signatures(toy: Episodes):
    other = replace(Episodes.example(seed=1), action_spec=toy.action_spec)
    both = bc.train([toy, other], CLONING, seed=[0, 1], progress=False).policy
    assert both.signatures == (Signature.of(toy), Signature.of(other))
    assert both.member(1).signatures == (Signature.of(other),)
    shared = bc.train(toy, CLONING, seed=[0, 1], progress=False).policy
    assert shared.member(1).signatures == shared.signatures == (Signature.of(toy),)
    whole = joined([both, shared])
    assert [s == Signature.of(toy) for s in whole.signatures] == [True, False, True, True]
    assert whole.origin["seeds"] == [0, 1, 0, 1]


def test_a_guarded_policy_survives_saving(toy: Episodes, clone: StackedPolicy, tmp_path: Path):
    for kind, kappa in (("centroid", float("inf")), ("neighbour", 2.0)):
        support = support_of(toy, SupportConfig(kind, most=50))  # type: ignore[arg-type]
        guarded = GuardedPolicy.around(clone, support, kappa)
        guarded.save(tmp_path / kind)
        again, obs = load_policy(tmp_path / kind), torch.randn(40, 2) * 2
        assert isinstance(again, GuardedPolicy) and again.kappa == kappa and again.signatures == clone.signatures
        assert torch.equal(again.probs(obs), guarded.probs(obs))
        assert torch.equal(again.member(0).probs(obs), guarded.probs(obs))
    likely = LikelyPolicy.around(clone, clone, 0.05)
    with pytest.raises(ValueError, match="LikelyPolicy cannot be kept"): likely.save(tmp_path / "likely")
    assert not (tmp_path / "likely").exists()


# ---- other data


def test_a_policy_refuses_other_data(clone: StackedPolicy, toy: Episodes):
    (signature,) = clone.signatures
    signature.check(toy)
    flip = replace(toy, obs=toy.obs[..., ::-1], final_obs=toy.final_obs[:, ::-1], feature_names=toy.feature_names[::-1],
                   normaliser=replace(toy.normaliser, **{k: v[::-1] for k, v in toy.normaliser.__dict__.items()}))
    for other, message in (
        (flip, "another order: number 0 is lactate, where the policy has map"),
        (replace(toy, units={"map": "kPa", "lactate": "mmol/L"}), "map in 'kPa', where the policy has 'mmHg'"),
        (replace(toy, alignment={"step_h": 1.0}), "step_h=1.0, where the policy has 4.0"),
        (replace(toy, normaliser=replace(toy.normaliser, mean=(0.0, 0.0))), "scaled otherwise"),
        (Episodes.example(seed=1), "actions that mean other doses"),
    ):
        with pytest.raises(ValueError, match=message): signature.check(other)
        with pytest.raises(ValueError, match=message): evaluate(other, clone, behaviour=clone)
    assert len(evaluate(toy, clone, behaviour=clone, estimators=("WIS",)))


def test_states_are_put_on_the_policys_scale(clone: StackedPolicy, toy: Episodes):
    other = replace(Episodes.example(seed=1), action_spec=toy.action_spec)
    adapted = clone.signatures[0].adapted(other)
    for name in toy.feature_names:
        np.testing.assert_allclose(adapted.physical(name), other.physical(name), rtol=1e-4)
    assert np.abs(adapted.obs - other.obs).max() > 0.01
    with pytest.raises(ValueError, match="lacks map"):
        Signature.of(toy).adapted(replace(
            other, obs=other.obs[..., 1:], final_obs=other.final_obs[:, 1:], feature_names=("lactate",),
            normaliser=other.normaliser.only("lactate")))


@given(st.permutations(["map", "lactate", "extra"]))
def test_columns_are_found_by_name(order: list[str]):
    toy = Episodes.example(20)
    signature = Signature.of(toy)
    table = pd.DataFrame({"map": [61.0, np.nan], "lactate": [4.0, 1.0], "extra": [1.0, 2.0]})[order]
    np.testing.assert_array_equal(signature.states(table, toy.units),
                                  toy.normaliser.transform(table[["map", "lactate"]].to_numpy()))


def test_named_values_need_names_and_units(clone: StackedPolicy, toy: Episodes):
    chart = pd.DataFrame({"lactate": [4.0], "map": [60.0]})
    assert choices(clone, chart, toy.units).loc[0, "name"] in toy.action_spec.names
    for table, units, message in ((chart[["map"]], toy.units, "lacks lactate"), (chart, {}, "in 'no unit'"),
                                  (chart, {**toy.units, "lactate": "mg/dL"}, "mg/dL")):
        with pytest.raises(ValueError, match=message): choices(clone, table, units)
    nameless = StackedPolicy(clone.config, [0])
    with pytest.raises(ValueError, match="does not know the names"): choices(nameless, chart, toy.units)
    with pytest.raises(ValueError, match="2 of them; take member"):
        choices(StackedPolicy(clone.config, [0, 1]), torch.zeros(2, 2))


# ---- actions


def test_actions_are_decoded():
    assert [decode_action(a) for a in (0, 4, 5, 24)] == [(0, 0), (0, 4), (1, 0), (4, 4)]
    for a in range(25): assert 5 * decode_action(a)[0] + decode_action(a)[1] == a
    for wrong in (-1, 25, 0.5, True):
        with pytest.raises(ValueError, match="integers 0 to 24"): decode_action(wrong)  # type: ignore[arg-type]


# ---- networks from elsewhere


def published(prefix: str = "", sizes: tuple[int, ...] = (62, 256, 256, 25)) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"{prefix}net.{n}": x.detach().clone() for n, x in torch_network(sizes).state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "policy_network.", "actor.", "module.actor.", "model.policy_network."])
def test_the_published_layout_loads(prefix: str, tmp_path: Path):
    save_file(published(prefix), tmp_path / "model.safetensors")
    net, obs = torch_network((62, 256, 256, 25)), torch.randn(100, 62)
    net.load_state_dict({n.removeprefix("net."): x for n, x in published().items()})
    policy = load_network(tmp_path)
    torch.testing.assert_close(policy.probs(obs), net(obs).softmax(-1))
    assert torch.equal(policy.act(obs, deterministic=True), net(obs).argmax(-1))
    names = sorted(f"f{i}" for i in range(62))
    told = load_network(tmp_path / "model.safetensors", features=names)
    table = pd.DataFrame(obs.numpy(), columns=names)[names[::-1]]
    assert choices(told, table, dict.fromkeys(names, "scaled")).action.tolist() == net(obs).argmax(-1).tolist()


def test_zeros_are_the_average_patient(tmp_path: Path):
    save_file(published(), tmp_path / "model.safetensors")
    rows = torch.zeros(2, 62)
    rows[1, 3] = 0.1
    said = choices(load_network(tmp_path), rows)
    assert said.note.tolist() == [AVERAGE, ""]
    assert [decode_action(a) for a in said.action] == list(zip(said.vasopressor_bin, said.fluid_bin, strict=True))


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: {**t, "net.2.weight": torch.zeros(256, 255)}, r"net.2 has weights \(256, 255\).* after a layer of 256"),
    (lambda t: {**t, "net.4.bias": torch.zeros(24)}, r"net.4 has weights \(25, 256\) and biases \(24,\)"),
    (lambda t: {n: x for n, x in t.items() if n != "net.2.bias"}, "net.2 lacks its weight or its bias"),
    (lambda t: {**t, "q.0.weight": torch.zeros(1)}, "needs net.0.weight.*has q.0.weight"),
    (lambda t: {**t, "net.0.bias": torch.full((256,), torch.nan)}, "not finite"),
    (lambda t: {}, "has nothing"),
], ids=["chain", "bias", "absent", "odd", "nan", "empty"])
def test_other_layouts_are_refused(change: Callable[[dict], dict], message: str, tmp_path: Path):
    save_file(change(published()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"): load_network(tmp_path)


def test_pickles_and_torn_files_are_refused(tmp_path: Path):
    torch.save(published("module."), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which may run"): load_network(tmp_path)
    assert load_network(tmp_path, trust_pickle=True).config.n_obs == 62
    save_file(published(), whole := tmp_path / "model.safetensors")
    assert load_network(tmp_path).config.n_obs == 62  # the safetensors, where both are there
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors: is torn"): load_network(whole)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no safetensors"): load_network(tmp_path / "empty")


def test_a_feature_list_must_fit(tmp_path: Path):
    save_file(published(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="61 names for 62 inputs"): load_network(tmp_path, features=["x"] * 61)
    with pytest.raises(ValueError, match="twice"): load_network(tmp_path, features=["x"] * 62)
