"Cards are made from the objects they speak of, hide small counts, and refuse to be silent on what matters."

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from medsim.agents import bc, ppo
from medsim.agents.behaviour import Logistic
from medsim.agents.cards import (
    ALWAYS,
    NOTICE,
    SIMULATED,
    Card,
    card_text,
    export,
    header,
    practice_text,
    to_markdown,
)
from medsim.agents.policy import StackedPolicy, load_policy
from medsim.data.actions import SepsisGrid
from medsim.data.cohorts import all_adults
from medsim.data.episodes import Episodes
from medsim.data.store import EventStore
from medsim.data.timeline import decision_steps
from medsim.envs.registration import sepsis
from medsim.envs.vector import TreatmentVectorEnv
from medsim.ope.estimate import compare
from medsim.ope.safety import safety_flags

QUICK = bc.BC(steps=20, batch=32, hidden=(8,), validate_every=20)


@pytest.fixture(scope="module")
def made(sample_store: EventStore) -> tuple[StackedPolicy, Card, Episodes]:
    "A card as a user makes one: records, cohort, episodes, policy, estimates, flags."
    cohort = all_adults(sample_store)
    edges = SepsisGrid((0.05, 0.1, 0.2), (100.0, 300.0, 600.0))
    episodes = decision_steps(sample_store, cohort, step_h=4, action=edges)
    policy = bc.train(episodes, QUICK, progress=False).policy
    model = Logistic(C=1.0).fit(episodes, (episodes.ids.fold == "train").to_numpy())
    held = episodes.select((episodes.ids.fold != "train").to_numpy())
    values = compare(held, {"clone": policy}, behaviour=model.on(held), estimators=("WIS", "CWPDIS"))
    card = Card("A clone", "medsim's synthetic sample.", cohort.shown_flow(), episodes.summary(), values,
                safety_flags(held, policy, name="clone"), limits=("It knows nobody.",))
    return policy, card, episodes


def test_the_card_says_everything(made: tuple[StackedPolicy, Card, Episodes], tmp_path: Path):
    policy, card, episodes = made
    export(policy, tmp_path / "clone", card)
    text = (tmp_path / "clone" / "README.md").read_text()
    assert NOTICE in text and all(f"- {x}" in text for x in (*ALWAYS, "It knows nobody."))
    for section in ("Intended use", "Data", "Features and units", "Actions", "Alignment", "Training", "Evaluation",
                    "Safety flags", "Limits", "How to load it"): assert f"## {section}\n" in text
    rows = text.split("## Features and units")[1].split("## Actions")[0].splitlines()
    names = [r.split(" | ")[0].removeprefix("| ") for r in rows if r.startswith("| ")][2:]
    assert names == list(episodes.feature_names)
    assert episodes.data_hash() in text and "strictly before its decision" in text and "mmol/L" in text
    assert card.flow.step.iloc[-1] in text and "at_risk" in text and "vasopressor (ug/kg/min NEE) | 4 | 0.2" in text
    assert load_policy(tmp_path / "clone").origin["learner"] == "BC"
    with pytest.raises(FileExistsError): export(policy, tmp_path / "clone", card)


def test_the_header_is_yaml_and_holds_no_flagged_number(made: tuple[StackedPolicy, Card, Episodes]):
    policy, card, _ = made
    values = pd.DataFrame({"policy": "clone", "estimator": ["WIS", "PDIS"], "value": [1.5, 9.0], "ci_low": [1.0, 0.0],
                           "ci_high": [2.0, 99.0], "ess": [60.0, 1.2], "n": 80, "flag": ["", "ESS"]})
    card = replace(card, evaluation=values, title='A "quoted": title')
    top = yaml.safe_load(card_text(policy, card).split("---\n")[1])
    assert top == json.loads(json.dumps(header(card))) and top["library_name"] == "medsim"
    (result,) = top["model-index"][0]["results"]
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("WIS", 1.5) and "ESS 60" in metric["name"]
    assert "model-index" not in header(replace(card, evaluation=values.iloc[1:]))


def test_small_counts_are_hidden(made: tuple[StackedPolicy, Card, Episodes]):
    policy, card, _ = made
    folds = pd.DataFrame({"episodes": [90, 7, 12, 109], "subjects": [80, 6, 11, 97], "steps": [900, 61, 130, 1091]},
                         index=pd.Index(["train", "val", "test", "all"], name="fold"))
    text = card_text(policy, replace(card, episodes=folds))
    assert "| val | <10 |  |  |" in text and "| all |" not in text and "| 61 |" not in text  # nor by subtraction
    assert "| val | 7 | 6 | 61 |" in card_text(policy, replace(card, episodes=folds, open_data=True))


def test_a_leaky_alignment_is_shouted(made: tuple[StackedPolicy, Card, Episodes]):
    policy, card, _ = made
    (signature,) = policy.signatures
    leaky = policy.member(0)
    leaky.signatures = (replace(signature, alignment={**signature.alignment, "alignment": "concurrent"}),)
    assert "they see the future. Do not use" in card_text(leaky, card)


@pytest.mark.parametrize(("table", "columns"), [("evaluation", ["ess", "ci_low"]), ("safety", ["at_risk"]),
                                                ("flow", ["excluded"]), ("episodes", ["subjects"])])
def test_a_card_without_what_matters_is_refused(made: Any, table: str, columns: list[str]):
    _, card, _ = made
    with pytest.raises(ValueError, match=f"{table}: lacks the columns .*{columns[0]}"):
        replace(card, **{table: getattr(card, table).drop(columns=columns)})
    with pytest.raises(ValueError, match=f"{table}: has no row"):
        replace(card, **{table: getattr(card, table).iloc[:0]})


def test_whose_card_is_clear(made: tuple[StackedPolicy, Card, Episodes], tmp_path: Path):
    policy, card, episodes = made
    both = bc.train(episodes, QUICK, seed=[0, 1], progress=False).policy
    with pytest.raises(ValueError, match="2 of them; take member"): export(both, tmp_path / "both", card)
    nameless = StackedPolicy(policy.config, [0])
    with pytest.raises(ValueError, match="no signature"): export(nameless, tmp_path / "nameless", card)
    assert not list(tmp_path.iterdir())


def test_who_practised_in_simulators_has_a_card_of_another_kind():
    env = TreatmentVectorEnv(sepsis(2), 2, budget=3, backend="pinn")
    practised = ppo.train(env, ppo.PPO(steps=8, rollout=4, minibatch=4, hidden=(8,)), progress=False).policy
    came = pd.DataFrame({"SOFA(all)": ["4.1 [3.9, 4.3]"]})
    text = practice_text(practised, "Two of them", "Virtual patients.", came, ["Practised for a moment."])
    assert text.index(NOTICE) < text.index("## Patients") and "| 4.1 [3.9, 4.3] |" in text
    assert all(f"- {x}" in text for x in (*SIMULATED, "Practised for a moment.")) and "- learner: PPO\n" in text
    names = practised.signatures[0].names
    assert "decisions_left" in names and all(f"| {n} |" in text for n in names) and "- policies: 2\n" in text
    assert "offline" not in yaml.safe_load(text.split("---\n")[1])["tags"]
    with pytest.raises(ValueError, match="evaluation: has no row"): practice_text(practised, "", "", came.iloc[:0])
    practised.signatures = ()
    with pytest.raises(ValueError, match="no signature"): practice_text(practised, "", "", came)


def test_cells_cannot_break_the_table():
    assert to_markdown(pd.DataFrame({"a": ["x|y\nz", None], "b": [1234.56, 0.00123]})).splitlines()[2:] == [
        "| x\\|y z | 1235 |", "|  | 0.00123 |"]
