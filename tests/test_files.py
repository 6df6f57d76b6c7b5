"""Folders and files that appear whole or not at all, whatever kills their process."""

import signal
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from hydrahead import files
from hydrahead.evaluation.figures import plot_head_map
from hydrahead.files import atomic_file, atomic_folder

WRITE_FOREVER = """
import pathlib, sys, time
from hydrahead.files import atomic_folder
with atomic_folder(sys.argv[1], overwrite=True) as partial:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing `tmp_path / "student"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(tmp_path / "student")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_the_same_folder(tmp_path, writer):
    (tmp_path / ".student.b.abc.partial").mkdir()  # of another folder, student.b
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (left,) = tmp_path.glob(".student.*.partial/half")
    with atomic_folder(tmp_path / "student") as partial:
        assert not left.exists()
        (partial / "whole").touch()
    assert names(tmp_path) == [".student.b.abc.partial", "student"] and names(tmp_path / "student") == ["whole"]


def test_what_a_living_process_writes_is_left_alone(tmp_path, writer):
    before = names(tmp_path)
    with (
        pytest.raises(ValueError, match=r"^[^\n]*student: another process is writing it; [^\n]*$"),
        atomic_folder(tmp_path / "student"),
    ):
        pass
    with atomic_folder(tmp_path / "other"):
        pass
    assert writer.poll() is None and names(tmp_path) == sorted([*before, "other"])


def test_a_folder_that_was_about_to_be_replaced_comes_back(tmp_path):
    """Killed between the two renames: the old one has another name, the new one is not there."""
    for ending in ("partial", "replaced"):
        (tmp_path / f".student.abc.{ending}").mkdir()
        (tmp_path / f".student.abc.{ending}" / ending).touch()
    with pytest.raises(ValueError, match="not empty"), atomic_folder(tmp_path / "student"):
        pass
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "student", overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["student"] and names(tmp_path / "student") == ["replaced"]


@pytest.fixture
def forced(monkeypatch) -> list[list[str]]:
    """What is forced to the disk, in order: the names of each call."""
    calls = []
    monkeypatch.setattr(
        files,
        "force_to_disk",
        lambda *paths: calls.append([path.name for path in paths]),
    )
    return calls


def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_too(tmp_path, forced):
    with atomic_file(tmp_path / "a.json") as partial:
        partial.write_text("new")
    assert forced == [["a.json.partial"], [tmp_path.name]] and names(tmp_path) == ["a.json"]
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "new"


def test_all_of_a_folder_is_on_the_disk_before_its_name_is(tmp_path, forced):
    with atomic_folder(tmp_path / "student") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").touch()
    assert [sorted(each) for each in forced] == [sorted(["inner", "file", partial.name]), [tmp_path.name]]


def test_a_picture_that_is_not_finished_does_not_take_the_old_ones_place(tmp_path, monkeypatch):
    def half(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    path = tmp_path / "map.png"
    plot_head_map([[0.5, 0.1]], [[1, 0]], "title", path)
    whole = path.read_bytes()
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space"):
        plot_head_map([[0.5, 0.1]], [[1, 0]], "title", path)
    assert path.read_bytes() == whole and names(tmp_path) == ["map.png"]
