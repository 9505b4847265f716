"Small worlds whose truth is known, for several test files."

import numpy as np

from medsim.envs.mdp import TabularMDP


def world(states: int = 6, actions: int = 3, seed: int = 0) -> TabularMDP:
    "States that lead anywhere; one in five steps ends, in death or survival."
    rng = np.random.default_rng(seed)
    p = np.zeros((states + 3, actions, states + 3))
    p[:states, :, :states] = 0.8 * rng.dirichlet(np.ones(states), (states, actions))
    die = 0.2 * rng.uniform(size=(states, actions))
    p[:states, :, states], p[:states, :, states + 1], p[states:, :, states + 2] = die, 0.2 - die, 1
    reward = np.where(np.arange(states + 3) == states + 1, 1.0, 0.0)
    return TabularMDP.from_dense(p, reward, np.where(np.arange(states + 3) < states, 1 / states, 0))
