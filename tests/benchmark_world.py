"""World model and policy in imagination: sequences and imagined steps a CPU second. Not part of the test run.

    python tests/benchmark_world.py [--steps 2] [--rounds 5] [--batch 64] [--length 50] [--starts 256] [--peer PYTHON]

"world": a gradient step of the world model (loss, backward, clipping, Adam) on a batch of sequences; "policy": 15
steps imagined from states, and a gradient step of actor and critic on them. 40 features, 25 actions; memory 256, hidden
256, 32 x 32 latent classes, heads 2 x 512, 255 places of rewards and values; one thread, CPU seconds; a rate is the
median of `--rounds`.

`--peer PYTHON` (or MEDSIM_TORCHRL), an interpreter that has torchrl 0.14 but not medsim, times torchrl's DreamerV3
losses at the same sizes in turns with ours, so that a busy machine slows both, and prints the median of the rounds'
ratios. Both sides then have the same encoder (a perceptron on value, mask and staleness: 120-128-64), a decoder with
one hidden layer of 512, and no carried values. What theirs does not have stays in ours: the mask of what was not
observed and of padded rows, the hours between rows as an input, layer norms in memory, prior and posterior (theirs:
the plain GRU, the cheaper of their two), the slow critic in the returns. What ours does not have stays in theirs: a
prior drawn at every row, and gradients kept along the imagined path. Sizes, optimiser, reinforce, continuation,
returns and two-hot critic are alike; weights: 4.01 million in both models, 1.98 in both policies. `--own`: our
default encoder and decoder ("direct", carrying).
"""

import argparse
import json
import os
import sys
import time
from functools import cache
from statistics import median
from typing import Any

import torch
from other_interpreter import Peer
from torch.nn.functional import one_hot

FEATURES, ACTIONS, HORIZON = 40, 25, 15
MEMORY, HIDDEN, GROUPS, UNITS, PLACES, CODE = 256, 256, 32, 512, 255, 64
LATENT = GROUPS * GROUPS  # as many classes as groups


def timed(step: Any, n: int) -> float:
    "Calls a CPU second; `step` takes the number of the call."
    step(0)
    begin = time.process_time()
    for j in range(n): step(1 + j)
    return n / (time.process_time() - begin)


def descent(parameters: Any, loss_of: Any) -> Any:
    "A gradient step, to be called with its number."
    parameters = list(parameters)
    adam = torch.optim.AdamW(parameters, 1e-4, weight_decay=1e-5)

    def step(j: int) -> None:
        loss = loss_of(j)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 100.0)
        adam.step()

    return step


def numbers(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    "Values, mask, hours, action, reward and end of a batch of sequences, the same on both sides."
    g = torch.Generator().manual_seed(0)
    value = torch.randn(batch, length, FEATURES, generator=g)
    observed = torch.rand(batch, length, FEATURES, generator=g) < 0.4
    hours, action = torch.rand(batch, length, generator=g) * 8, torch.randint(ACTIONS, (batch, length), generator=g)
    return value, observed, hours, action, torch.randn(batch, length, generator=g), torch.zeros(batch, length).bool()


@cache
def ours(what: str, batch: int, length: int, starts: int, own: bool) -> Any:
    "A gradient step of ours."
    from medsim.world.charts import Rows
    from medsim.world.imagination import ActorCritic, ImagineConfig, actor_critic_losses, imagine
    from medsim.world.rssm import Latent
    from medsim.world.world_model import WorldConfig, WorldModel, world_loss

    alike: dict[str, Any] = dict() if own else dict(form="mlp", carry=False)
    model, g = WorldModel(FEATURES, ACTIONS, WorldConfig(**alike)), torch.Generator().manual_seed(1)
    if what == "world":
        value, observed, hours, action, reward, ended = numbers(batch, length)
        first, there = torch.zeros(batch, length).bool(), torch.ones(batch, length).bool()
        first[:, 0] = True
        age = hours[..., None].expand_as(value)
        rows = Rows(value, observed, age, age, action, hours, reward, ended, first, action, ended, there)
        return descent(model.parameters(), lambda j: world_loss(model, rows, g)[0])
    agent = ActorCritic(LATENT + MEMORY, ACTIONS)
    p, z = torch.zeros(1), one_hot(torch.randint(GROUPS, (starts, GROUPS), generator=g), GROUPS).float()
    start = Latent(torch.randn(starts, MEMORY, generator=g), z.flatten(1), p.expand_as(z), p.expand_as(z))
    learned = [x for x in agent.parameters() if x.requires_grad]

    def loss(j: int) -> torch.Tensor:
        with torch.no_grad(): seen = imagine(model, start, agent, HORIZON, generator=g)
        agent.follow()
        return actor_critic_losses(agent, seen, ImagineConfig(HORIZON))["loss"]

    return descent(learned, loss)


def told_by(n_out: int, key: Any, lead: tuple[str, ...] = (), depth: int = 2) -> Any:
    "A head of torchrl's on state and belief."
    from tensordict.nn import TensorDictModule
    from torchrl.modules import DreamerV3MLP

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = DreamerV3MLP(LATENT + MEMORY, n_out, depth=depth, num_cells=UNITS)

        def forward(self, state: torch.Tensor, belief: torch.Tensor) -> torch.Tensor:
            return self.net(torch.cat([state, belief], -1))

    return TensorDictModule(Head(), in_keys=[(*lead, "state"), (*lead, "belief")], out_keys=[key])


def parts() -> tuple[Any, Any]:
    "Prior and posterior of torchrl's."
    from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3

    sizes = dict(hidden_dim=HIDDEN, rnn_hidden_dim=MEMORY, num_categoricals=GROUPS, num_classes=GROUPS, unimix=0.05)
    return (RSSMPriorV3(action_shape=(ACTIONS,), action_dim=ACTIONS, **sizes),
            RSSMPosteriorV3(obs_embed_dim=CODE, **sizes))


def their_world(batch: int, length: int) -> Any:
    "A gradient step of torchrl's world model."
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.modules import RSSMRolloutV3, SymExpTwoHot
    from torchrl.objectives import DreamerV3ModelLoss

    prior, posterior = parts()
    decoded = TensorDictModule(SymExpTwoHot(PLACES).decode, in_keys=[("next", "reward_logits")],
                               out_keys=[("next", "reward")])
    layers = (torch.nn.Linear(3 * FEATURES, 128), torch.nn.SiLU(), torch.nn.Linear(128, CODE), torch.nn.SiLU())
    model = TensorDictSequential(
        TensorDictModule(torch.nn.Sequential(*layers), in_keys=[("next", "charted")],
                         out_keys=[("next", "encoded_latents")]),
        RSSMRolloutV3(
            TensorDictModule(prior, in_keys=["state", "belief", "action"],
                             out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")]),
            TensorDictModule(posterior, in_keys=[("next", "belief"), ("next", "encoded_latents")],
                             out_keys=[("next", "posterior_logits"), ("next", "state")])),
        told_by(FEATURES, ("next", "told"), ("next",), depth=1), told_by(PLACES, ("next", "reward_logits"), ("next",)),
        told_by(1, ("next", "continue_pred"), ("next",)), decoded)
    loss = DreamerV3ModelLoss(model, lambda_continue=1.0, kl_mode="separate", lambda_dynamic=0.5,
                              lambda_representation=0.1, unimix=0.05, free_bits=3.0, reco_symlog=False)
    loss.set_keys(pixels="value", reco_pixels="told")
    value, observed, hours, action, reward, ended = numbers(batch, length)
    first = torch.zeros(batch, length, 1).bool()
    first[:, 0] = True
    data = TensorDict({
        "state": torch.zeros(batch, length, LATENT), "belief": torch.zeros(batch, length, MEMORY), "is_init": first,
        "action": one_hot(action, ACTIONS).float(),
        "next": {"charted": torch.cat([value, observed, hours[..., None].expand_as(value)], -1), "value": value,
                 "reward": reward[..., None], "done": ended[..., None], "terminated": ended[..., None]}},
        [batch, length])

    def total(j: int) -> torch.Tensor:
        return sum(x.sum() for n, x in loss(data)[0].items() if n.startswith("loss_"))  # type: ignore[return-value]

    return descent(model.parameters(), total)


def their_policy(starts: int) -> Any:
    "A gradient step of torchrl's actor and critic."
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.data import Composite, OneHot, Unbounded
    from torchrl.envs.model_based.dreamer import DreamerEnv
    from torchrl.modules import DreamerV3DiscreteActor, SymExpTwoHot, WorldModelWrapper
    from torchrl.objectives import DreamerV3ActorLoss, DreamerV3ValueLoss

    def decoded(key: str, out: str) -> Any:
        return TensorDictModule(SymExpTwoHot(PLACES).decode, in_keys=[key], out_keys=[out])

    class Unsqueezed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor: return x if x.shape[-1:] == (1,) else x[..., None]

    def number(name: str, out: str) -> Any:
        return TensorDictSequential(told_by(PLACES, name), decoded(name, out),
                                    TensorDictModule(Unsqueezed(), in_keys=[out], out_keys=[out]))

    prior, _ = parts()
    moved = TensorDictModule(prior, in_keys=["state", "belief", "action"], out_keys=["_", "state", "belief"])
    env = DreamerEnv(WorldModelWrapper(moved, number("reward_logits", "reward")), prior_shape=torch.Size([LATENT]),
                     belief_shape=torch.Size([MEMORY]))
    env.observation_spec = Composite(state=Unbounded(LATENT), belief=Unbounded(MEMORY))
    env.state_spec, env.action_spec, env.reward_spec = env.observation_spec.clone(), OneHot(ACTIONS), Unbounded((1,))
    actor = DreamerV3DiscreteActor(LATENT + MEMORY, ACTIONS, depth=2, num_cells=UNITS, unimix=0.1)
    value = number("state_value_logits", "state_value")
    share = TensorDictModule(torch.sigmoid, in_keys=["continue_pred"], out_keys=["continuation"])
    goes_on = TensorDictSequential(told_by(1, "continue_pred"), share)
    acting = DreamerV3ActorLoss(actor, value, env, continuation_model=goes_on, imagination_horizon=HORIZON,
                                entropy_bonus=5e-4, use_reinforce=True, return_normalization=False)
    acting.make_value_estimator(gamma=0.99, lmbda=0.9)
    judging = DreamerV3ValueLoss(value, "two_hot", actor_loss=acting)
    g = torch.Generator().manual_seed(1)
    z = one_hot(torch.randint(GROUPS, (starts, GROUPS), generator=g), GROUPS).float().flatten(1)
    start = TensorDict({"state": z, "belief": torch.randn(starts, MEMORY, generator=g)}, [starts])

    def total(j: int) -> torch.Tensor:
        told, imagined = acting(start)
        return told["loss_actor"] + judging(imagined)[0]["loss_value"]

    return descent([*actor.parameters(), *judging.value_model_params.parameters()], total)


@cache
def theirs(what: str, batch: int, length: int, starts: int) -> Any:
    "A gradient step of torchrl's."
    return their_world(batch, length) if what == "world" else their_policy(starts)


def serve() -> None:
    "The peer's rate for each line \"what batch length starts steps\" that comes."
    for line in sys.stdin:
        what, *sizes = line.split()
        batch, length, starts, steps = map(int, sizes)
        print(json.dumps(timed(theirs(what, batch, length, starts), steps)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="sequences")
    parser.add_argument("--length", type=int, default=50, help="rows of a sequence")
    parser.add_argument("--starts", type=int, default=256, help="states to imagine from")
    parser.add_argument("--what", nargs="+", default=["world", "policy"])
    parser.add_argument("--peer", default=os.environ.get("MEDSIM_TORCHRL"), help="an interpreter with torchrl")
    parser.add_argument("--own", action="store_true", help="our default encoder and decoder beside the peer's")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    try:
        import medsim  # noqa: F401
    except ImportError:
        serve()
        return
    peer = Peer(asked.peer, __file__, "torchrl") if asked.peer else None
    for what in asked.what:
        sizes, rates, others = (asked.batch, asked.length, asked.starts), list[float](), list[float]()
        step = ours(what, *sizes, asked.own or not peer)
        for _ in range(asked.rounds):
            if peer: others.append(peer.rate(what, *sizes, asked.steps))
            rates.append(timed(step, asked.steps))
        each = asked.batch if what == "world" else asked.starts * HORIZON
        unit = "sequences/s" if what == "world" else "imagined steps/s"
        spread = f"({each * min(rates):,.1f} to {each * max(rates):,.1f})"
        line = f"{what:6} {each * median(rates):9,.1f} {unit} {spread}"
        if peer:
            ratios = [a / b for a, b in zip(rates, others, strict=True)]
            line += (f"; torchrl {each * median(others):,.1f} "
                     f"({each * min(others):,.1f} to {each * max(others):,.1f}); "
                     f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(line, flush=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__": main()
