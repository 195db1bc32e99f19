from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from megatron_moe2dense import cli
from megatron_moe2dense.common import config as configs
from megatron_moe2dense.common.errors import UserError

DATA = ["data", "source=a.txt", "tokenizer=model", "output=out/a"]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    try:
        cli.main(argv)
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_command(capsys):
    for argv in ([], ["--help"], ["-h"]):
        code, out, _ = run(capsys, *argv)
        assert code == 0
        assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_shows_every_key(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    shown = {line.split()[0] for line in out.splitlines() if line}
    assert {row[0] for row in configs.describe_keys(cli._load(cli.COMMANDS[name].config))} <= shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_can_be_run_and_dry_run(name):
    command = cli.COMMANDS[name]
    assert callable(cli._load(command.run))
    assert callable(cli._load(command.dry_run))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_key_of_a_command_says_what_it_means(name):
    missing = [row[0] for row in configs.describe_keys(cli._load(cli.COMMANDS[name].config)) if not row[3]]
    assert not missing


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, "0.1.0\n")


def test_an_unknown_command_exits_2_with_a_suggestion(capsys):
    code, _, err = run(capsys, "calibrat")
    assert code == 2
    assert "found:    command 'calibrat'" in err
    assert "did you mean 'calibrate'?" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-rn"], "did you mean '--dry-run'"),
        (["a.yaml", "b.yaml"], "at most one argument without"),
        (["sourc=x"], "did you mean 'source'"),
        (["absent.yaml"], "No such file"),
        (["workers=two"], "workers"),
        (["--dry-run=3"], "--dry-run"),
    ],
)
def test_what_a_user_mistypes_exits_2_with_found_expected_do(capsys, arguments, words):
    code, _, err = run(capsys, *DATA, *arguments)
    assert code == 2
    assert words in err
    assert all(part in err for part in ("found: ", "expected: ", "do: "))
    assert "Traceback" not in err


def test_traceback_shows_where_a_user_error_came_from(capsys):
    code, _, err = run(capsys, "data", "sourc=x", "--traceback")
    assert code == 2
    assert "Traceback" in err


def test_print_config_loads_back_as_the_same_config(capsys, tmp_path):
    code, out, _ = run(capsys, *DATA, "workers=3", "--print-config")
    assert code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(out)
    assert run(capsys, "data", str(path), "--print-config") == (0, out, "")
    assert yaml.safe_load(out)["workers"] == 3


def test_overrides_win_over_the_yaml_file_wherever_they_stand(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("source: a\ntokenizer: t\noutput: o\nworkers: 2\n")
    for argv in (["workers=3", str(path), "--print-config"], ["--print-config", str(path), "workers=3"]):
        assert yaml.safe_load(run(capsys, "data", *argv)[1])["workers"] == 3


def test_a_bug_exits_1_with_its_traceback():
    code = (
        "import dataclasses; from megatron_moe2dense import cli\n"
        "cli.COMMANDS['data'] = dataclasses.replace(cli.COMMANDS['data'], run='common.errors:did_you_mean')\n"
        f"cli.main({DATA!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_user_error_inside_a_command_exits_2_from_the_shell():
    result = subprocess.run([sys.executable, "-m", "megatron_moe2dense", *DATA], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("moe2dense: error\nfound: ")


def test_dry_run_prints_the_config_and_the_facts_and_writes_nothing(capsys, tmp_path, tokenizer_directory):
    (tmp_path / "a.txt").write_text("some text")
    before = sorted(tmp_path.iterdir())
    argv = ["data", f"source={tmp_path / 'a.txt'}", f"tokenizer={tokenizer_directory}", f"output={tmp_path / 'out'}", "--dry-run"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    facts = json.loads(out)
    assert facts["config"]["workers"] == 1
    assert facts["reads"] == {"files": 1, "bytes": 9}
    assert sorted(tmp_path.iterdir()) == before


def test_user_errors_have_the_three_parts():
    error = UserError("a", "b", "c")
    assert str(error) == "found:    a\nexpected: b\ndo:       c"
