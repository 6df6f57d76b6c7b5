"""Where results come from: the same settings reuse work, others are refused by the first that differs."""

import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import hydrahead
from hydrahead import provenance
from hydrahead.provenance import Record, digest, environment

SETTINGS = {"teacher": {"name": "a", "revision": None}, "tokens": 10, "file": Path("text.txt"), "shape": (2, 3)}


def test_the_same_settings_match_whatever_json_makes_of_them(tmp_path):
    record = Record(tmp_path / "work" / "settings.json")
    assert not record.matches(SETTINGS) and record.read() is None
    record.write(SETTINGS)
    assert record.matches(SETTINGS)
    record.check(SETTINGS, "advice")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": {"name": "b", "revision": None}}, "teacher.name ('a', now 'b')"),
        ({"teacher": {"name": "a", "revision": "main"}}, "teacher.revision (None, now 'main')"),
        ({"tokens": 20}, "tokens (10, now 20)"),
        ({"seed": 0}, "seed (None, now 0)"),
        ({"shape": (2, 4)}, "shape ([2, 3], now [2, 4])"),
    ],
    ids=["nested", "was none", "number", "new", "tuple"],
)
def test_other_settings_are_refused_by_name(change, said, tmp_path):
    record = Record(tmp_path / "settings.json")
    record.write(SETTINGS)
    assert not record.matches(SETTINGS | change)
    with pytest.raises(ValueError) as refused:
        record.check(SETTINGS | change, "choose another output")
    assert str(refused.value) == f"{tmp_path}: made with another {said}; choose another output"


def test_a_setting_that_was_not_recorded_yet_stands_for_its_default_and_state_is_not_compared(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"tokens": 10, "done": 3}))
    record = Record(path, {"separator": "</s>"})
    record.check({"tokens": 10, "separator": "</s>"}, "advice")
    with pytest.raises(ValueError, match=r"another separator \('</s>', now '<eot>'\)"):
        record.check({"tokens": 10, "separator": "<eot>"}, "advice")


def test_a_digest_is_that_of_the_bytes(tmp_path):
    for content in (b"masks", b"other masks"):
        (tmp_path / "file").write_bytes(content)
        assert digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_digest_of_a_models_folder_is_that_of_its_weights_alone(tmp_path):
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    before = digest(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert digest(tmp_path) == before
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    assert digest(tmp_path) != before


def test_the_environment_is_told_without_importing_pytorch():
    """`hydrahead select` writes it, and has a second and a half."""
    code = "import sys, hydrahead.provenance as p; found = p.environment(); assert 'torch' not in sys.modules, found"
    subprocess.run([sys.executable, "-c", code], check=True)
    found = environment("cpu")
    assert {"python", "torch", "transformers"} <= found["versions"].keys() and "threads" in found["hardware"]


def test_the_version_is_known_where_the_package_is_only_on_the_path(monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(provenance, "version", not_installed)
    assert environment("cpu")["versions"]["hydrahead"] == hydrahead.__version__
