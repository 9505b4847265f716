"The estimators beside scope-rl's on episodes of equal length; its numbers were printed by `peer_scope_rl.py`."

import numpy as np
import pytest
from peer_scope_rl import episodes

from medsim.ope.doubly_robust import robust_sums
from medsim.ope.importance import sums

SCOPE_RL_0_2_1 = {
    "DM": 3.042706966828289, "IS": 2.495127721977417, "PDIS": 4.526214635094956, "DR": 5.61167021126995,
    "WIS": 4.82234283606707, "CWPDIS": 5.556043357258569, "WDR": 5.734037300401597,
}


@pytest.mark.parametrize("name", SCOPE_RL_0_2_1)
def test_estimators_are_the_peers(name):
    e = episodes()
    done = {k: np.take_along_axis(e[k], e["action"][..., None], -1)[..., 0] for k in ("policy", "behaviour", "q")}
    ratio, mask = done["policy"] / done["behaviour"], np.ones(e["reward"].shape, bool)
    v = (e["q"] * e["policy"]).sum(-1)
    ours = sums(ratio, e["reward"], mask, 0.9).values()
    ours |= robust_sums(ratio, e["reward"], mask, done["q"], v, 0.9).values()
    assert ours[name] == pytest.approx(SCOPE_RL_0_2_1[name], rel=1e-6)
