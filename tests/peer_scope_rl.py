"""The same episodes valued by scope-rl, in an environment that has it: prints the constants of `test_ope_peer.py`.

    python tests/peer_scope_rl.py

scope-rl wants other versions of our dependencies; this file needs numpy and scope-rl alone, not medsim.
"""

import json

import numpy as np


def episodes(n: int = 50, t: int = 7, a: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    "n episodes of t steps each with a actions: probabilities, what was done, rewards, a model's values."
    rng = np.random.default_rng(seed)
    behaviour, policy = (rng.dirichlet(np.ones(a), (n, t)) * 0.8 + 0.2 / a for _ in range(2))
    action = (rng.random((n, t, 1)) > behaviour.cumsum(-1)[..., :-1]).sum(-1)
    return {"behaviour": behaviour, "policy": policy, "action": action, "reward": rng.normal(1, 1, (n, t)),
            "q": rng.normal(3, 1, (n, t, a))}


def main() -> None:
    from scope_rl.ope.discrete import basic_estimators as peer

    e = episodes()
    n, t, a = e["q"].shape
    chosen = np.take_along_axis(e["behaviour"], e["action"][..., None], -1)
    given = dict(step_per_trajectory=t, action=e["action"].ravel(), reward=e["reward"].ravel(), pscore=chosen.ravel(),
                 evaluation_policy_action_dist=e["policy"].reshape(n * t, a), gamma=0.9,
                 state_action_value_prediction=e["q"].reshape(n * t, a))
    names = {"DM": "DirectMethod", "IS": "TrajectoryWiseImportanceSampling", "PDIS": "PerDecisionImportanceSampling",
             "DR": "DoublyRobust", "WIS": "SelfNormalizedTIS", "CWPDIS": "SelfNormalizedPDIS",
             "WDR": "SelfNormalizedDR"}
    print(json.dumps({ours: getattr(peer, theirs)().estimate_policy_value(**given) for ours, theirs in names.items()}))


if __name__ == "__main__": main()
