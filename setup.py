"Build script; every value comes from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
c = cfg["DEFAULT"]

extras = {
    key.removesuffix("_requirements").replace("_", "-"): c[key].split()
    for key in c
    if key.endswith("_requirements")
}

# Folders of the checkout that an installed package holds under a name of its own; they have no code. Of the notebooks'
# folders the notebooks alone: runs/ beside them may hold what came of patients' records.
shipped = {
    f"{c['lib_name']}.notebooks.tutorials": ("nbs/tutorials", ["*.ipynb"]),
    f"{c['lib_name']}.notebooks.experiments": ("nbs/experiments", ["*.ipynb"]),
    f"{c['lib_name']}.samples": ("data_samples", ["*", "*/*"]),
}

setup(
    name=c["lib_name"],
    version=c["version"],
    description=c["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=c["author"],
    license="Apache-2.0",
    python_requires=f">={c['min_python']}",
    packages=[*find_packages(include=[c["lib_name"], f"{c['lib_name']}.*"]), *shipped],
    package_dir={package: folder for package, (folder, _) in shipped.items()},
    install_requires=c["requirements"].split(),
    extras_require=extras,
    entry_points={
        "nbdev": [f"{c['lib_name']}={c['lib_name']}._modidx:d"],
        "console_scripts": c["console_scripts"].split(),
    },
    package_data={
        c["lib_name"]: ["py.typed", "data/*.csv", "envs/septic/*"],
        **{package: patterns for package, (_, patterns) in shipped.items()},
    },
    zip_safe=False,
)
