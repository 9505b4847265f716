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

from medsim.core.paths import data_folder, sample_folder  # noqa: E402
from medsim.data.store import EventStore, extract  # noqa: E402

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


def extracted(folder: Path, name: str, tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    "The store of a folder, extracted once a session: the first worker to finish puts it where the others find it."
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"store-{name}"
    if not shared.exists():
        own = extract(folder, tmp_path_factory.mktemp(name) / "store", progress=False).folder
        try:
            own.rename(shared)
        except OSError:  # another worker was first; its bytes are the same
            pass
    return EventStore.open(shared)


@pytest.fixture(scope="session")
def mimic3_store(mimic3_demo, tmp_path_factory) -> EventStore:
    return extracted(mimic3_demo, "mimic3", tmp_path_factory)


@pytest.fixture(scope="session")
def mimic4_store(mimic4_demo, tmp_path_factory) -> EventStore:
    return extracted(mimic4_demo, "mimic4", tmp_path_factory)


@pytest.fixture(scope="session")
def eicu_store(eicu_demo, tmp_path_factory) -> EventStore:
    return extracted(eicu_demo, "eicu", tmp_path_factory)


@pytest.fixture(scope="session")
def meds_store(meds_demo, tmp_path_factory) -> EventStore:
    return extracted(meds_demo, "meds", tmp_path_factory)


@pytest.fixture(scope="session")
def challenge_store(challenge2012, tmp_path_factory) -> EventStore:
    return extracted(challenge2012, "challenge", tmp_path_factory)


@pytest.fixture(scope="session")
def sample_store(tmp_path_factory) -> EventStore:
    "The store of the bundled synthetic cohort: always there in a checkout."
    return extracted(sample_folder(), "sample", tmp_path_factory)
