"Action specs: what is encoded comes back, edges fall where they are said to fall, and bad doses are refused."

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medsim.data.actions import (
    Continuous,
    SepsisGrid,
    VentilationGrid,
    action_spec_from_dict,
    dose_bin,
    predicted_body_weight,
)

dose = st.one_of(st.just(0.0), st.floats(1e-6, 1e4))
some_doses = arrays(float, st.integers(1, 40), elements=dose).filter(lambda x: (x > 0).any())
unit = st.floats(0, 1, width=32)


@given(some_doses, some_doses)
def test_every_training_dose_is_in_a_bin_that_its_own_dose_encodes_to(vaso, fluid):
    grid = SepsisGrid.fit(vaso, fluid)
    n = min(len(vaso), len(fluid))
    ids = grid.encode(vaso[:n], fluid[:n])
    assert (grid.encode(*grid.dose(ids)) == ids).all()
    assert ((ids // 5 == 0) == (vaso[:n] == 0)).all() and ((ids % 5 == 0) == (fluid[:n] == 0)).all()


@given(some_doses)
def test_edges_close_the_bin_below(vaso):
    grid = SepsisGrid.fit(vaso, vaso)
    edges = np.array(grid.vasopressor_edges)
    at, above = grid.encode(edges, 0 * edges) // 5, grid.encode(np.nextafter(edges, np.inf), 0 * edges) // 5
    assert (at <= [1, 2, 3]).all() and (above >= [2, 3, 4]).all()
    assert (np.diff(dose_bin(np.sort(vaso), grid.vasopressor_edges)) >= 0).all()


@given(some_doses, some_doses)
def test_decode_is_the_inverse_of_the_id(vaso, fluid):
    grid, ids = SepsisGrid.fit(vaso, fluid), np.arange(25)
    v, f = grid.decode(ids)
    assert (5 * v + f == ids).all() and len(set(grid.names)) == 25


def test_four_equal_bins_when_doses_are_distinct():
    doses = np.arange(1.0, 101)
    grid = SepsisGrid.fit(doses, doses)
    assert np.bincount(grid.encode(doses, 0 * doses) // 5).tolist() == [0, 25, 25, 25, 25]
    assert grid.notes == ()


@pytest.mark.parametrize(
    "doses, empty", [([0.1] * 9, "[2, 3, 4]"), ([0.1] * 9 + [0.3], "[2, 3]"), ([1, 2, 2, 2], "[3, 4]")]
)
def test_tied_quartiles_are_noted(doses, empty):
    grid = SepsisGrid.fit(doses, np.arange(20.0))
    assert len(grid.notes) == 1 and "vasopressor" in grid.notes[0] and empty in grid.notes[0]
    assert np.isfinite(grid.dose(np.arange(25))).all()


@pytest.mark.parametrize("wrong", [25, -1, [0, 30]])
def test_ids_outside_the_grid_are_refused(wrong):
    with pytest.raises(ValueError, match=r"0\.\.24"):
        SepsisGrid((1, 2, 3), (1, 2, 3)).decode(wrong)
    with pytest.raises(ValueError, match=r"0\.\.17"):
        VentilationGrid().settings(18)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_bad_doses_name_the_drug_and_hide_the_value(bad):
    grid = SepsisGrid((1, 2, 3), (1, 2, 3))
    with pytest.raises(ValueError, match="fluid: 1 of 2") as e:
        grid.encode([0, 0.123], [bad, 0.123])
    assert "0.123" not in str(e.value)
    with pytest.raises(ValueError, match="vasopressor: 1 of 2"):
        Continuous().encode([21, 21], [bad, 0], [0, 0])


def test_no_dose_at_all_names_the_drug():
    with pytest.raises(ValueError, match="fluid: none of 3 training doses"):
        SepsisGrid.fit([0, 1, 2], [0, 0, 0])


@given(st.integers(0, 17), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_settings_inside_the_range_of_an_action_encode_to_it(a, x, y, z):
    vent = VentilationGrid()
    ranges = vent.settings(a)
    inside = [lo + (0.01 + 0.98 * u) * (hi - lo) for u, (lo, hi) in zip((x, y, z), ranges.values(), strict=True)]
    assert vent.encode(*inside) == a and len(set(vent.names)) == 18


def test_ventilation_boundaries():
    vent = VentilationGrid()
    assert vent.encode(0, [21, 35, 36, 49, 50, 100], 6).tolist() == [0, 0, 3, 3, 6, 6]
    assert vent.encode(0, 21, [6.5, 6.51, 7.99, 8]).tolist() == [0, 1, 1, 2]
    assert vent.encode([5, 5.01], 21, 6).tolist() == [0, 9]


forms = st.sampled_from(["linear", "log"])


@given(arrays(np.float32, (5, 3), elements=unit), forms, st.floats(0.1, 5), st.floats(9, 5e3))
def test_continuous_round_trip(a, form, most, most_fluid):
    spec = Continuous(most, most_fluid, form)
    back = spec.encode(*spec.decode(a))
    assert back.dtype == np.float32 and np.allclose(back, a, atol=2e-6)


@given(st.floats(21, 100), st.floats(0, 3), st.floats(0, 3000), forms)
def test_continuous_clips_to_the_maximum_and_counts_it(fio2, vaso, fluids, form):
    spec = Continuous(form=form)
    f, v, i = spec.decode(spec.encode(fio2, vaso, fluids))
    assert np.allclose([f, v, i], [fio2, min(vaso, 0.5), min(fluids, 500)], rtol=1e-4, atol=1e-4)
    assert spec.clipped_share(vaso, fluids) == {"vasopressor": vaso > 0.5, "fluids": fluids > 500}


@pytest.mark.parametrize("wrong", [[1.1, 0, 0], [0, -0.1, 0], [0, 0, np.nan], [0, 0], 0.5])
def test_continuous_decode_refuses_what_is_no_action(wrong):
    with pytest.raises(ValueError):
        Continuous().decode(wrong)


def test_specs_survive_json_and_unknown_kinds_do_not():
    for spec in (SepsisGrid.fit([1, 2, 3], [4, 5, 6]), VentilationGrid(), Continuous(form="log")):
        assert action_spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(ValueError, match="unknown action spec"):
        action_spec_from_dict({"kind": "dict"})
    with pytest.raises(ValueError, match="unknown fields"):
        action_spec_from_dict({"kind": "Continuous", "max_oxygen": 1})


def test_predicted_body_weight_is_in_kg_and_refuses_inches():
    assert np.allclose(predicted_body_weight([180, 160], ["M", "F"]), [75.116, 52.416])
    with pytest.raises(ValueError, match="1 of 2 values"):
        predicted_body_weight([68, 170], ["M", "M"])
