"""`model_type: hydrahead` in transformers' auto classes: our code loads a folder, and the folder's is not run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hydrahead import HydraHeadConfig, HydraHeadForCausalLM, HydraHeadModel
from hydrahead.configuration_hydrahead import AUTO_MAP
from hydrahead.tests.families import make_student, random_ids

ROOT = Path(__file__).parents[1]
CODE = tuple(f"{name}_hydrahead.py" for name in ("configuration", "modeling", "ops", "kernels"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A HydraHead folder whose own code would leave a file if it were run."""
    folder = tmp_path_factory.mktemp("planted") / "student"
    make_student().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "demo" / "teacher" / name, folder)
    for name in CODE:
        text = (folder / name).read_text()
        (folder / name).write_text(f"open({str(folder / 'was_run')!r}, 'w').close()\n{text}")
    return folder


def run_python(code: str, *arguments, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


LOAD = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
found = set()
for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
    AutoTokenizer.from_pretrained(sys.argv[1], **trust)
    for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(sys.argv[1], **trust)
        found.add(type(loaded).__module__ + "." + type(loaded).__name__)
    found.add(type(AutoModelForCausalLM.from_config(loaded.config, **trust)).__module__)
print(json.dumps(sorted(found)))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import hydrahead",
        "from transformers import AutoModel; import hydrahead",
        "from transformers import AutoConfig; import hydrahead",
        "from hydrahead import HydraHeadForCausalLM",  # loads the tables while it is half imported
    ],
)
def test_our_classes_load_a_folder_in_whatever_order_things_are_imported(imports, folder, tmp_path):
    found = json.loads(run_python(imports + LOAD, folder, cwd=tmp_path))
    assert found == [
        "hydrahead.configuration_hydrahead.HydraHeadConfig",
        "hydrahead.modeling_hydrahead",
        "hydrahead.modeling_hydrahead.HydraHeadForCausalLM",
        "hydrahead.modeling_hydrahead.HydraHeadModel",
    ]
    assert not (folder / "was_run").exists()


def test_where_hydrahead_cannot_be_imported_the_folders_own_code_is_run_when_it_is_trusted(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "student")
    code = """
import sys
sys.modules["hydrahead"] = None
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)).__module__)
"""
    assert run_python(code, copy, cwd=tmp_path).startswith("transformers_modules.")
    assert (folder / "was_run").exists()
    (folder / "was_run").unlink()


def test_importing_hydrahead_imports_neither_torch_nor_transformers(tmp_path):
    code = "import sys, hydrahead; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert run_python(code, cwd=tmp_path).strip() == "[]"


def test_what_was_loaded_is_saved_with_our_code_and_loads_the_same(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in CODE:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    ids = random_ids(1, 9)
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (folder, tmp_path))
    assert torch.equal(one, other)


def test_an_instance_made_from_a_configuration_is_ours():
    config = make_student().config
    assert AutoConfig.for_model("hydrahead").__class__ is HydraHeadConfig
    assert type(AutoModel.from_config(config)) is HydraHeadModel
    assert type(AutoModelForCausalLM.from_config(config)) is HydraHeadForCausalLM
