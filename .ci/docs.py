"""Build pages of all notebooks, as they are, into _docs/, without a network.

In an environment of its own: pip install -e ".[docs]", then python .ci/docs.py.
"""
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PARTS = ("tutorials", "experiments", "core", "data", "sim", "envs", "agents", "world", "ope", "bench")

MATHML = """from docutils.nodes import SkipNode
from latex2mathml.converter import convert

def shown(display):
    def visit(self, node):
        self.body.append(convert(node.astext(), display=display))
        raise SkipNode
    return visit, None

def setup(app): app.add_html_math_renderer("mathml", shown("inline"), shown("block"))
"""  # formulas as part of the page; the usual renderer would fetch a script from elsewhere


def page(path: Path, first: dict[str, str]) -> str:
    "A notebook without nbdev's directives; links of the index lead to pages, those to a folder to its first page."
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            text = re.sub(r"^#\|.*\n?", "", text, flags=re.M).lstrip("\n")
        elif path.parent.name == "nbs":
            text = re.sub(r"\]\(nbs/(\w+)\)", lambda m: f"]({first[m[1]]}.ipynb)", text).replace("](nbs/", "](")
        cell["source"] = text
    nb["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "python3"}
    nb["cells"] = [c for c in nb["cells"] if c["source"].strip()]
    return json.dumps(nb)


def main() -> None:
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    about = settings["DEFAULT"]
    config = {
        "title": about["title"], "author": about["author"], "copyright": "2026", "only_build_toc_files": True,
        "execute": {"execute_notebooks": "off"}, "html": {"home_page_in_navbar": True},
        "sphinx": {"local_extensions": {"mathml": "."}, "config": {"html_math_renderer": "mathml"}},
    }
    files = {part: sorted((ROOT / "nbs" / part).glob("*.ipynb")) for part in PARTS}
    names = {part: [f"{part}/{p.stem}" for p in found] for part, found in files.items()}
    toc = {"format": "jb-book", "root": "index", "parts": [
        {"caption": part.capitalize(), "chapters": [{"file": n} for n in found]} for part, found in names.items()]}
    first = {part: found[0] for part, found in names.items()}
    with TemporaryDirectory() as tmp:
        source = Path(tmp)
        for path in [ROOT / "nbs/index.ipynb", *sum(files.values(), [])]:
            to = source / path.relative_to(ROOT / "nbs")
            to.parent.mkdir(exist_ok=True)
            to.write_text(page(path, first), encoding="utf-8")
        (source / "mathml.py").write_text(MATHML)
        (source / "_config.yml").write_text(json.dumps(config))  # JSON is YAML
        (source / "_toc.yml").write_text(json.dumps(toc))
        book = "from jupyter_book.cli.main import main; main()"
        build = [sys.executable, "-c", book, "build", str(source), "--path-output", str(ROOT / "_docs")]
        if failed := subprocess.run(build).returncode: sys.exit(failed)
    print(f"pages: {ROOT.name}/_docs/_build/html/index.html")


if __name__ == "__main__":
    main()
