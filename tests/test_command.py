"The program medsim: exit codes and sentences, runs that are stopped, go on or are refused, and notebooks as programs."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

import medsim
from medsim.bench import notebooks
from medsim.bench.command import COMMANDS, RESEARCH_ONLY, main
from medsim.bench.notebooks import NotebookFailed, copy_notebooks, read_notebook, run_notebook, shipped, with_parameters
from medsim.core.paths import OutputExists, sample_folder

QUICK = """# Parameters
DATA = None
OUT = "runs/quickstart"
"""
WORK = """import json, os, pathlib
out = pathlib.Path(OUT)
times = len(list(out.glob("began-*")))
(out / f"began-{times}").touch()
if os.environ.get("BREAK") == str(times): raise ValueError("no treatment is charted")
(out / "report.html").write_text("<p>")
(out / "metrics.json").write_text(json.dumps({"verdict": "not to be believed", "scale": os.environ["MEDSIM_SCALE"]}))
"""


def written(path: Path, *cells: str) -> Path:
    "A notebook file; cells that begin with a heading are text."
    new = [nbformat.v4.new_markdown_cell(c) if re.match("##? (?!Param)", c) else nbformat.v4.new_code_cell(c)
           for c in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=new), path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "An empty folder to stand in, and a quickstart of three lines in place of the shipped one."
    written(tmp_path / "nbs/tutorials/01_quickstart.ipynb", "# Quick", QUICK, "## 1. All of it", WORK)
    monkeypatch.setattr(notebooks, "notebooks_folder", lambda: tmp_path / "nbs")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MEDSIM_DATA", raising=False)
    return tmp_path / "work"


def told(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    "Exit code, standard output and error of the program, without bars."
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, "\n".join(line for line in err.splitlines() if line and not re.search("cell/s|s/cell", line))


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    "The one line of a refusal."
    code, _, err = told(capsys, *argv)
    assert code == 2 and err.startswith("medsim: ") and "\n" not in err, (code, err)
    return err


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- help


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_with_an_example(name, capsys):
    code, out, _ = told(capsys, name, "--help")
    examples = re.findall(rf"^  (medsim {name}.*)$", out, re.M)
    assert code == 0 and examples
    assert all(option in out for option in set(re.findall(r"--[a-z-]+", " ".join(examples))))


def test_help_lists_every_command_and_comes_without_torch(capsys):
    code, out, _ = told(capsys, "--help")
    assert code == 0 and RESEARCH_ONLY in out.replace("\n", " ") and all(name in out for name in COMMANDS)
    assert told(capsys)[1] == out
    heavy = "import sys; from medsim.bench.command import main; main(['--help']); " \
            "sys.exit(str({'torch', 'duckdb', 'pandas', 'nbclient'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_version_and_module():
    done = subprocess.run([sys.executable, "-m", "medsim", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"medsim {medsim.__version__}\n")


def test_a_listener_that_leaves_is_no_error():
    said = subprocess.run(f"{sys.executable} -m medsim --help | true", shell=True, capture_output=True, text=True)
    assert said.stderr == ""


@pytest.mark.parametrize("argv", [
    ("fly",), ("extract", "a"), ("run", "x", "--scale", "huge"), ("audit", "--step-h", "x")])
def test_arguments_that_are_none(argv, capsys, here):
    code, out, err = told(capsys, *argv)
    assert code == 2 and "Traceback" not in err and not out and not files(here)


# ---- quickstart


def test_quickstart_runs_tells_and_is_not_run_twice(here, capsys):
    code, out, _ = told(capsys, "quickstart", "--scale", "paper", "--out", "q")
    assert code == 0 and RESEARCH_ONLY in out
    assert "report: q/report.html" in out and "verdict: not to be believed" in out
    run = json.loads(Path("q/run.json").read_text())
    assert run["finished"] and run["medsim"] == medsim.__version__ and run["data"] is None and run["scale"] == "paper"
    assert json.loads(Path("q/metrics.json").read_text())["scale"] == "paper"
    assert "OUT = 'q'" in [c.source.split("\n")[-1] for c in read_notebook("q/quickstart.ipynb").cells]
    before = files(here)
    assert "holds a finished run" in refused(capsys, "quickstart", "--scale", "paper", "--out", "q")
    assert files(here) == before


def test_a_run_that_failed_goes_on_with_the_same_command_alone(here, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BREAK", "0")
    said = refused(capsys, "quickstart", "--data", str(sample_folder()))
    assert said == "medsim: the stage '1. All of it' failed with ValueError: no treatment is charted"
    out, before = Path("runs/quickstart"), files(here)
    run = json.loads((out / "run.json").read_text())
    assert not run["finished"] and run["data"] == sample_folder().name and run["scale"] == "smoke"

    assert "with data " in refused(capsys, "quickstart")
    assert "scale 'smoke' instead" in refused(capsys, "quickstart", "--data", str(sample_folder()), "--scale", "paper")
    changed = shutil.copytree(sample_folder(), tmp_path / "changed" / sample_folder().name)
    (changed / "hosp/diagnoses_icd.csv.gz").unlink()
    assert "data_mark" in refused(capsys, "quickstart", "--data", str(changed))
    assert files(here) == before

    code, told_, _ = told(capsys, "quickstart", "--data", str(sample_folder()))
    assert code == 0 and "going on with the run in runs/quickstart" in told_
    assert {p.name for p in out.glob("began-*")} == {"began-0", "began-1"}
    assert json.loads((out / "run.json").read_text())["finished"]


def test_quickstart_refuses_what_is_no_data_and_no_place(here, capsys):
    Path("empty").mkdir()
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("mine")
    Path("broken").mkdir()
    Path("broken/run.json").write_text("{")
    before = files(here)
    for argv, why in (
        (("--data", "nowhere"), "nowhere: there is no such folder"), (("--data", "empty"), "empty: unknown layout"),
        (("--data", "file"), "file: not a folder of tables"), (("--out", "full"), "holds no run of medsim"),
        (("--out", "broken"), "holds no run of medsim"), (("--out", "file"), "file exists and is not a folder"),
        (("--out", "file/q"), "choose a place that can be used"),
    ):
        assert why in refused(capsys, "quickstart", *argv), argv
    assert files(here) == before


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(here, capsys):
    Path("locked").mkdir(mode=0o500)
    assert "permission denied" in refused(capsys, "quickstart", "--out", "locked/q")


def test_an_empty_folder_is_free(here, capsys):
    Path("q").mkdir()
    assert told(capsys, "quickstart", "--out", "q")[0] == 0


# ---- extract, audit, notebooks


def test_extract_tells_what_was_read_and_lost(here, capsys):
    code, out, _ = told(capsys, "extract", str(sample_folder()), "store")
    rows = json.loads(Path("store/provenance.json").read_text())["rows"]
    assert code == 0 and f"{rows['stays']} stays, {rows['events']:,} events" in out and "repeated" in out
    assert "'store' is not empty" in refused(capsys, "extract", str(sample_folder()), "store")
    assert "no such folder" in refused(capsys, "extract", "nowhere", "other") and not Path("other").exists()


def test_audit_prints_a_verdict_and_writes_a_row(here, capsys):
    small = ("audit", "--patients", "40", "--agent", "clone", "--out", "row.csv")
    code, out, _ = told(capsys, *small)
    assert code == 0 and "true_clinicians" in out and "% survive" in out
    header, row = Path("row.csv").read_text().splitlines()
    assert header.startswith("step_h,") and ",40,True," in row
    assert "row.csv exists" in refused(capsys, *small)
    assert "soften=2.0" in refused(capsys, "audit", "--soften", "2")


def test_notebooks_are_copied_whole_or_not(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told(capsys, "notebooks", "mine")[:2] == (0, f"{len(shipped())} notebooks in mine\n")
    copies = {p.relative_to("mine").with_suffix("").as_posix(): p for p in Path("mine").rglob("*") if p.is_file()}
    assert set(copies) == set(shipped())
    for name, copy in copies.items():
        assert copy.read_bytes() == (notebooks.notebooks_folder() / f"{name}.ipynb").read_bytes()
    assert "not empty" in refused(capsys, "notebooks", "mine")
    with pytest.raises(OutputExists): copy_notebooks("mine")


# ---- a notebook as a program


def test_run_by_name_by_path_and_not_at_all(here, capsys):
    for wrong in ("tutorials/quickstart", "01_quickstart", "tutorials/01_quikstart.ipynb"):
        assert "did you mean tutorials/01_quickstart?" in refused(capsys, "run", wrong)
    assert "there are tutorials/01_quickstart" in refused(capsys, "run", "zzz")
    written(Path("own.ipynb"), "import os\nprint(os.getcwd(), os.environ['MEDSIM_SCALE'])")
    assert told(capsys, "run", "own.ipynb", "--scale", "paper")[0] == 0
    assert read_notebook("runs/own.ipynb").cells[0].outputs[0].text == f"{here} paper\n"
    assert "'own.ipynb' exists" in refused(capsys, "run", "own.ipynb")
    assert "'own.ipynb' exists" in refused(capsys, "run", "own.ipynb", "--out", "own.ipynb")
    Path("text.ipynb").write_text("no notebook")
    assert "not a Jupyter notebook" in refused(capsys, "run", "text.ipynb")


def test_a_mistake_in_the_code_of_a_notebook_is_not_the_users(here, capsys):
    bad = written(Path("bad.ipynb"), "# T", "print('kept')", "## Two", "1 / 0", "print('never')")
    code, _, err = told(capsys, "run", str(bad))
    assert code == 1 and err == "medsim: the stage 'Two' failed with ZeroDivisionError: division by zero"
    kept = [c.outputs for c in read_notebook("runs/bad.ipynb").cells if c.cell_type == "code"]
    assert kept[0][0].text == "kept\n" and kept[1][0].ename == "ZeroDivisionError" and kept[2] == []
    written(bad, "# T", "print('mended')")
    assert told(capsys, "run", str(bad))[0] == 0  # what an unfinished run left is replaced


@pytest.mark.parametrize(("code", "mendable"), [
    ("from medsim.data.sources import open_source; open_source('nowhere')", True),
    ("raise PermissionError(13, 'Permission denied', 'x')", True),
    ("import no_such_package", True),
    ("raise TypeError('\\x1b[31mred\\n  and more\\x1b[0m')", False),
])
def test_a_failed_cell_is_one_sentence(tmp_path, code, mendable):
    with pytest.raises(NotebookFailed) as failed:
        run_notebook(written(tmp_path / "n.ipynb", "## Só", code), tmp_path / "out.ipynb", progress=False)
    said = str(failed.value)
    assert failed.value.mendable is mendable and said.startswith("the stage 'Só' failed with ")
    assert "\n" not in said and "\x1b" not in said and "Traceback" not in said


def test_a_kernel_that_dies_is_told(tmp_path):
    dies = written(tmp_path / "n.ipynb", "## Big", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(NotebookFailed, match="'Big'.*memory"):
        run_notebook(dies, tmp_path / "out.ipynb", progress=False)


@pytest.mark.parametrize(("value", "reads"), [
    ("it's \"so\"\n", None), (Path("a b"), "a b"), (3, None), (-0.5, None), (True, None), (None, None)])
def test_parameters_survive_being_written_down(value, reads):
    cells = [nbformat.v4.new_code_cell(c) for c in ("import os", "# Parameters\nX: object = 1\nY = 2", "X")]
    found: dict = {}
    for cell in with_parameters(nbformat.v4.new_notebook(cells=cells), {"X": value}).cells: exec(cell.source, found)
    assert found["X"] == (value if reads is None else reads) and found["Y"] == 2


@pytest.mark.parametrize(("cells", "given", "why"), [
    (["# Parameters\nX = 1\nY, Z = 2, 3"], {"W": 1}, "no parameter W; it has X"),
    (["X = 1"], {"X": 2}, "no code cell that begins with '# Parameters'"),
    (["# Parameters\nX = 1"], {"X": float("nan")}, "X=nan"),
    (["# Parameters\nX = 1"], {"X": [1]}, r"X=\[1\]"),
])
def test_parameters_that_cannot_be(tmp_path, cells, given, why):
    with pytest.raises(ValueError, match=why):
        run_notebook(written(tmp_path / "n.ipynb", *cells), tmp_path / "out.ipynb", parameters=given)
    assert not (tmp_path / "out.ipynb").exists()


def test_the_kernel_is_this_interpreter_and_leaves_nothing(tmp_path, monkeypatch):
    for variable in ("TMPDIR", "HOME", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr("tempfile.tempdir", None)
    other = tmp_path / "JUPYTER_DATA_DIR/kernels/python3"  # an installed kernel of another interpreter
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps(dict(argv=["false"], display_name="x", language="python")))
    asks = written(tmp_path / "n.ipynb", "import sys\nprint(sys.executable)")
    out = run_notebook(asks, tmp_path / "out.ipynb", progress=False)
    assert read_notebook(out).cells[0].outputs[0].text == f"{sys.executable}\n"
    left = [p for v in ("TMPDIR", "HOME", "JUPYTER_RUNTIME_DIR") for p in (tmp_path / v).rglob("*") if p.is_file()]
    assert not left


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_kernel_keeps_what_ran_and_can_be_repeated(sent, tmp_path, monkeypatch):
    long = "import pathlib, time\npathlib.Path('asleep').touch()\ntry: time.sleep(SECONDS)\n" \
           "finally: pathlib.Path('put-away').touch()"
    written(tmp_path / "long.ipynb", "# Parameters\nSECONDS = 600", "print('ran')", "## Sleep", long,
            "open('never', 'w')")
    command = [sys.executable, "-m", "medsim", "run", "long.ipynb"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a parent in the background may ignore it
    until = time.monotonic() + 60
    while not (tmp_path / "asleep").exists() and time.monotonic() < until: time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.endswith("medsim: stopped; the same command goes on where it stopped\n")
    assert "Traceback" not in said and not any(c.is_running() for c in children)
    assert (tmp_path / "put-away").exists() and not (tmp_path / "never").exists()
    kept = read_notebook(tmp_path / "runs/long.ipynb")
    assert kept.cells[1].outputs[0].text == "ran\n" and kept.metadata["medsim"]["finished"] is False
    monkeypatch.chdir(tmp_path)
    again = run_notebook("long.ipynb", "runs/long.ipynb", parameters={"SECONDS": 0}, progress=False)
    assert read_notebook(again).metadata["medsim"]["finished"] is True
