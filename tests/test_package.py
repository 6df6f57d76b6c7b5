"""What pip installs: sdist and wheel hold all that is needed, and work where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from hydrahead import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = [name.replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]]
NOT_OURS = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__")  # what lies in a checkout and is not tracked


def run(*words, **options) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """An sdist of the tree, and the wheel that is made of nothing but the sdist."""
    folder = tmp_path_factory.mktemp("built")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_OURS))
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=tree)
    sdist = folder / f"hydrahead-{__version__}.tar.gz"
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, folder / f"hydrahead-{__version__}")
    return {"sdist": sdist, "wheel": folder / f"hydrahead-{__version__}-py3-none-any.whl"}


def test_the_version_is_one_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = [line.split()[1].strip("[]") for line in changes.splitlines() if line.startswith("## ")]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0] == PROJECT["project"]["version"] == citation["version"] == __version__


def test_the_paper_is_cited_as_the_methods_source():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["type"] == "software"
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2606.20097" and paper["title"].startswith("HydraHead: ")
    assert all(author.keys() == {"given-names", "family-names"} for author in paper["authors"])


def test_the_wheel_holds_every_module_and_every_file_that_they_read(built):
    with zipfile.ZipFile(built["wheel"]) as file:
        held = {name for name in file.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    modules = {
        f"{part}/{path.name}"
        for part in PARTS
        for path in ROOT.joinpath(*part.split("/")[1:]).iterdir()
        if path.suffix == ".py"
    }
    read = {  # beside modules
        f"hydrahead/{path.relative_to(ROOT).as_posix()}"
        for pattern in (
            "py.typed",
            "demo/teacher/*",
            "evaluation/*.html",
            "kernels/hopper/*",
            "training/measured.json",
            "training/recipes/**/*.yaml",
        )
        for path in ROOT.glob(pattern)
    }
    assert held == modules | read


def test_the_sdist_holds_what_building_testing_and_reading_need(built):
    with tarfile.open(built["sdist"]) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    roots = {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").iterdir()}
    assert roots | tests | pages <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith((".", "runs"))]


# Runs commands, loads what they made, and says which modules came from where.
USE = """
import json, sys
from hydrahead.cli import app
app(["convert", "demo", "student", "--masks", "masks.json", "--calibration-tokens", "64"], standalone_mode=False)
app(["run", "demo", "--dry-run"], standalone_mode=False)
app(["plan", "demo"], standalone_mode=False)
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("student")
tokenizer = AutoTokenizer.from_pretrained("student")
inputs = tokenizer("import ", return_tensors="pt", return_token_type_ids=False)
model.generate(**inputs, max_new_tokens=3, do_sample=False)
from hydrahead.evaluation import report
from hydrahead.kernels import use_tuned_kernels
use_tuned_kernels()
files = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
print(json.dumps({"class": type(model).__module__, "files": files}))
"""


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_that_knows_no_checkout(built, tmp_path):
    """Its dependencies are borrowed from the environment of the tests."""
    home = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "borrowed.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, built["wheel"])
    work = tmp_path / "work"
    work.mkdir()
    (work / "masks.json").write_text(json.dumps([[1, 1, 0, 0, 0, 0, 0, 0]] * 6))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": work, "env": environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}}

    command = home / "bin" / "hydrahead"
    assert run(command, "--version", **options) == f"hydrahead {__version__}\n"
    assert {"run", "score", "select", "convert"} <= set(run(command, "--help", **options).split())
    said = json.loads(run(python, "-c", USE, **options).splitlines()[-1])
    assert said["class"] == "hydrahead.modeling_hydrahead"
    ours = [Path(file) for file in said["files"] if Path(file).is_relative_to(packages / "hydrahead")]
    assert packages / "hydrahead" / "pipeline.py" in ours
    venv = Path(sys.prefix)  # may lie in the checkout
    borrowed = [Path(file) for file in said["files"] if not Path(file).is_relative_to(venv)]
    assert [file for file in borrowed if file.is_relative_to(ROOT)] == []
    made_from = json.loads((work / "student" / "made_from.json").read_text())
    assert made_from["versions"]["hydrahead"] == __version__
    # And in a process without hydrahead, as from the Hub.
    code = "import sys; sys.modules['hydrahead'] = None; from transformers import AutoModelForCausalLM as Auto; "
    code += "print(type(Auto.from_pretrained('student', trust_remote_code=True)).__module__)"
    assert run(python, "-c", code, **options).startswith("transformers_modules.")
