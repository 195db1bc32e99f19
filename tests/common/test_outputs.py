from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from megatron_moe2dense.common import outputs
from megatron_moe2dense.common.content import config_hash
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import MANIFEST, output_directory, read_manifest

CONFIG = {"keep": 4, "source": "model", "overwrite": False}
OTHER = {**CONFIG, "keep": 8}


class InterruptedRunError(Exception):
    pass


def interrupted_run(output, config=CONFIG, name="part.txt"):
    with contextlib.suppress(InterruptedRunError), output_directory(output, "score", config) as working:
        (working / name).write_text("half")
        raise InterruptedRunError


def names(folder):
    return sorted(item.name for item in folder.iterdir())


def test_an_output_appears_complete_with_its_manifest_or_not_at_all(tmp_path):
    output = tmp_path / "deep" / "out"
    with output_directory(output, "score", CONFIG, layers=2) as working:
        (working / "ranking.json").write_text("{}")
        assert not output.exists()
    assert names(output) == [MANIFEST, "ranking.json"]
    assert names(output.parent) == ["out"]
    manifest = read_manifest(output, "score")
    assert manifest["config"] == CONFIG
    assert manifest["layers"] == 2
    assert manifest["config_hash"] == config_hash(CONFIG)
    assert manifest["versions"]["python"].startswith("3.")


def test_an_interrupted_run_leaves_its_work_for_the_same_config(tmp_path):
    output = tmp_path / "out"
    interrupted_run(output)
    assert not output.exists()
    with output_directory(output, "score", CONFIG) as working:
        assert (working / "part.txt").read_text() == "half"
    assert read_manifest(output, "score")["status"] == "finished"


def test_an_interrupted_run_of_another_config_is_never_mixed_in(tmp_path):
    output = tmp_path / "out"
    interrupted_run(output)
    with pytest.raises(UserError, match="unfinished run of another config"), output_directory(output, "score", OTHER):
        pass
    assert (tmp_path / "out.tmp" / "part.txt").exists()
    with output_directory(output, "score", {**OTHER, "overwrite": True}) as working:
        assert names(working) == [MANIFEST]


def test_a_finished_output_is_refused_and_left_alone(tmp_path):
    output = tmp_path / "out"
    with output_directory(output, "score", CONFIG) as working:
        (working / "a").write_text("1")
    for config in (CONFIG, OTHER):
        with pytest.raises(UserError, match="is a finished output"), output_directory(output, "score", config):
            pass
    assert (output / "a").read_text() == "1"


def test_foreign_files_are_refused(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("")
    with pytest.raises(UserError, match="exists"), output_directory(output, "score", CONFIG):
        pass
    assert names(output) == ["mine"]


def test_foreign_files_where_the_work_happens_are_refused(tmp_path):
    working = tmp_path / "out.tmp"
    working.mkdir()
    (working / "mine").write_text("")
    with pytest.raises(UserError, match=r"out\.tmp"), output_directory(tmp_path / "out", "score", CONFIG):
        pass
    assert names(working) == ["mine"]


def test_overwrite_replaces_only_after_success(tmp_path):
    output = tmp_path / "out"
    with output_directory(output, "score", CONFIG) as working:
        (working / "a").write_text("old")
    replacing = {**CONFIG, "overwrite": True}
    interrupted_run(output, replacing, "a")
    assert (output / "a").read_text() == "old"
    with output_directory(output, "score", replacing) as working:
        (working / "a").write_text("new")
    assert (output / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_overwrite_says_nothing_about_the_content(tmp_path):
    assert config_hash(CONFIG) == config_hash({**CONFIG, "overwrite": True})
    assert config_hash(CONFIG) != config_hash(OTHER)


@pytest.mark.parametrize("old_exists", [True, False])
def test_a_run_killed_between_the_two_renames_heals(tmp_path, old_exists):
    """Killed after the old output was moved away: the next run still works and leaves nothing behind."""
    output = tmp_path / "out"
    with output_directory(output, "score", CONFIG) as working:
        (working / "a").write_text("old")
    output.rename(tmp_path / "out.old.tmp")
    if not old_exists:
        shutil.rmtree(tmp_path / "out.old.tmp")
    with output_directory(output, "score", {**CONFIG, "overwrite": True}) as working:
        (working / "a").write_text("new")
    assert (output / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_killed_process_leaves_no_output_and_can_be_resumed(tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from megatron_moe2dense.common.outputs import output_directory
        with output_directory(Path({str(tmp_path / "out")!r}), "score", {CONFIG!r}) as working:
            (working / "part.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    with output_directory(tmp_path / "out", "score", CONFIG) as working:
        assert (working / "part.txt").read_text() == "half"


def test_an_unfinished_or_foreign_directory_is_no_input(tmp_path):
    interrupted_run(tmp_path / "out")
    with pytest.raises(UserError, match="unfinished output of `score`"):
        read_manifest(tmp_path / "out.tmp", "score")
    with pytest.raises(UserError, match="No such file"):
        read_manifest(tmp_path / "absent", "score")
    with output_directory(tmp_path / "done", "score", CONFIG):
        pass
    with pytest.raises(UserError, match="finished output of `moe2dense calibrate`"):
        read_manifest(tmp_path / "done", "calibrate")


@pytest.mark.parametrize("content", ["", "[1]", "null", "{}", '"x"'])
def test_a_damaged_manifest_is_a_user_error(tmp_path, content):
    working = tmp_path / "out.tmp"
    working.mkdir()
    (working / MANIFEST).write_text(content)
    with pytest.raises(UserError):
        read_manifest(working, "score")
    with pytest.raises(UserError), output_directory(tmp_path / "out", "score", CONFIG):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_does_not_take_the_file_is_a_user_error_and_the_old_file_stays(tmp_path, monkeypatch, code):
    path = tmp_path / "a.json"
    outputs.write_json(path, {"a": 1})

    def refuse(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=os.strerror(code)):
        outputs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_full_disk_inside_an_output_directory_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No space left"), output_directory(tmp_path / "out", "score", CONFIG):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not (tmp_path / "out").exists()


def test_an_output_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError), output_directory(tmp_path / "file" / "out", "score", CONFIG):
        pass


def test_other_os_errors_are_bugs(tmp_path):
    with pytest.raises(FileNotFoundError), outputs.disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_checkout_on_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert outputs.commit.__wrapped__() is None


def test_json_is_written_readably_and_atomically(tmp_path):
    path = tmp_path / "x" / "a.json"
    outputs.write_json(path, {"é": [1, 2.5, None]})
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert "é" in path.read_text(encoding="utf-8")
    assert names(path.parent) == ["a.json"]
