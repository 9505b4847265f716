"""Double DQN or discrete CQL of d3rlpy on logged steps from a file: prints one JSON line with what its policy does.

    python tests/peer_d3rlpy.py steps.npz cql --seed 0 --steps 10000 --alpha 1

For an environment that has d3rlpy (2.8), which wants other versions of our dependencies; this file needs numpy and
d3rlpy alone, not medsim. The file holds `obs` (M, D), `action` (M,), `reward` (M,), `terminal` (M,), episodes one after
the other and each ended by a terminal step, `states` (S, D), where the policy is asked, and how many `actions` there
are. d3rlpy's loss is Huber's; its slow network is copied every `--target-every` steps; it clips no gradient.
"""

import argparse
import json
import time

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("algorithm", choices=["dqn", "cql"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--target-every", type=int, default=500)
    parser.add_argument("--alpha", type=float, default=1.0, help="of CQL")
    asked = parser.parse_args()

    import d3rlpy
    import structlog
    import torch

    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with np.load(asked.file) as f: steps = {n: f[n] for n in f.files}
    data = d3rlpy.dataset.MDPDataset(steps["obs"], steps["action"][:, None], steps["reward"], steps["terminal"],
                                     action_size=int(steps["actions"]))
    d3rlpy.seed(asked.seed)
    shared = dict(batch_size=asked.batch, gamma=asked.gamma, learning_rate=asked.rate,
                  target_update_interval=asked.target_every,
                  encoder_factory=d3rlpy.models.VectorEncoderFactory(hidden_units=asked.hidden, activation="relu"))
    config = (d3rlpy.algos.DiscreteCQLConfig(alpha=asked.alpha, **shared) if asked.algorithm == "cql"
              else d3rlpy.algos.DoubleDQNConfig(**shared))
    agent = config.create(device="cpu:0")
    begin = time.process_time()
    agent.fit(data, n_steps=asked.steps, n_steps_per_epoch=asked.steps, show_progress=False, save_interval=10**9,
              logger_adapter=d3rlpy.logging.NoopAdapterFactory())
    spent = time.process_time() - begin
    some = slice(0, 20_000)
    print(json.dumps({
        "d3rlpy": d3rlpy.__version__, "steps": len(steps["obs"]), "episodes": len(data.episodes), "seconds": spent,
        "action": agent.predict(steps["states"]).tolist(),
        "data_q": float(agent.predict_value(steps["obs"][some], steps["action"][some]).mean()),
    }))


if __name__ == "__main__": main()
