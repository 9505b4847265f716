"Settings and folders that every test shares. Data comes from `$MEDSIM_DATA`; without it, tests skip."

import os
from pathlib import Path

# Before torch or medsim is imported; the workers and the notebooks inherit them.
os.environ["MEDSIM_SCALE"] = "smoke"
os.environ["MEDSIM_CHECK_TYPES"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from medsim.core.paths import data_folder  # noqa: E402

settings.register_profile("house", derandomize=True, database=None, deadline=None)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Notebooks first: they take longest, and the short tests fill the gaps at the end."
    items.sort(key=lambda item: item.get_closest_marker("notebooks") is None)


def demo(name: str) -> Path:
    "Folder of a demo under `$MEDSIM_DATA`; the test is skipped where it is not there."
    folder = data_folder(name)
    if folder is None:
        pytest.skip(f"no {name}: set MEDSIM_DATA to a folder that holds it")
    return folder


@pytest.fixture(scope="session")
def mimic3_demo() -> Path:
    return demo("mimic-iii-demo")


@pytest.fixture(scope="session")
def mimic4_demo() -> Path:
    return demo("mimic-iv-demo")


@pytest.fixture(scope="session")
def eicu_demo() -> Path:
    return demo("eicu-demo")


@pytest.fixture(scope="session")
def meds_demo() -> Path:
    return demo("mimic-iv-demo-meds")


@pytest.fixture(scope="session")
def challenge2012() -> Path:
    return demo("challenge-2012")


# Stores extracted once a session from these folders have their fixtures below.
