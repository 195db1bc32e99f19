"""Models by name, against huggingface_hub's own cache layout and a small hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest

from megatron_moe2dense import cli
from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common import config as configs
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.content import identity
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.config import InspectConfig
from megatron_moe2dense.surgery.inspect import inspect
from tests.helpers.hub import NAME, Hub, cached, commit_of, serving, use_cache
from tests.helpers.tiny_models import tiny_qwen3_moe

OLD, NEW = commit_of(0), commit_of(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Path:
    """A sharded MoE with a tokenizer."""
    directory = tiny_qwen3_moe(tmp_path_factory.mktemp("source") / "model", max_shard_size="400KB", num_hidden_layers=2)
    shutil.copyfile(tokenizer_directory / "tokenizer.json", directory / "tokenizer.json")
    return directory


@pytest.fixture
def cache(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of the model; `main` and the tag are the newer."""
    use_cache(monkeypatch, tmp_path / "hub")
    cached(tmp_path / "hub", model, OLD, ("refs/pr/1",))
    cached(tmp_path / "hub", model, NEW, ("main", "v1.0"))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("revision", "commit"), [("", NEW), ("@main", NEW), ("@v1.0", NEW), (f"@{OLD}", OLD), (f"@{NEW}", NEW), ("@refs/pr/1", OLD)]
)
def test_a_name_is_the_snapshot_of_its_branch_tag_or_commit(cache: Path, revision: str, commit: str):
    found = hub.located(NAME + revision)
    assert found == cache.resolve() / "models--someone--tiny-moe/snapshots" / commit
    assert hub.revision_of(found) == {"revision": {"name": NAME, "commit": commit}}
    with_hub = huggingface_hub.try_to_load_from_cache(NAME, "config.json", revision=revision[1:] or None)
    assert Path(str(with_hub)).resolve() == (found / "config.json").resolve()


def test_the_cache_is_the_one_of_the_environment(cache: Path):
    code = f"from megatron_moe2dense.common import hub; print(hub.located({NAME!r}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {"HF_HOME": str(cache.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert Path(done.stdout.strip()).name == NEW


def test_a_folder_of_that_name_wins(cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert hub.located(NAME).name == NEW
    shutil.copytree(model, tmp_path / NAME)
    assert hub.located(NAME) == Path(NAME)
    assert not hub.revision_of(hub.located(NAME))


@pytest.mark.parametrize("path", ["models/absent/model", "/models/absent", "./models/absent", "../absent", "absent", "out/model.json"])
def test_what_can_only_be_a_path_is_one(cache: Path, path: str):
    assert hub.located(path) == Path(path)


@pytest.mark.parametrize("source", ["someone/other", f"{NAME}@v2", f"{NAME}@{commit_of(2)}"])
def test_what_is_neither_here_nor_in_the_cache_says_both_and_how_to_get_it(cache: Path, source: str, user_error):
    message = user_error("inspect", source)
    name, _, revision = source.partition("@")
    assert f"{source}: no folder or file of that path" in message
    assert f"no model {name} of revision {revision or 'main'} in {cache}" in message
    assert "--download" in message
    assert f"`hf download {name}{' --revision ' * bool(revision)}{revision}`" in message


def test_a_snapshot_without_its_weights_says_how_to_get_them(cache: Path):
    for shard in hub.located(NAME).glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(UserError, match="shards absent") as refused:
        CheckpointIndex.open(NAME)
    assert "--download" in refused.value.do


def test_manifests_say_name_and_commit(cache: Path, capsys: pytest.CaptureFixture[str]):
    cli.main(["inspect", NAME, "--json"])
    by_name = json.loads(capsys.readouterr().out)
    cli.main(["inspect", str(hub.located(f"{NAME}@{OLD}")), "--json"])
    by_path = json.loads(capsys.readouterr().out)
    assert by_name["revision"] == {"name": NAME, "commit": NEW}
    assert by_name["fingerprint"] == by_path["fingerprint"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_key_that_is_a_checkpoint_takes_names(command: str):
    config = cli._load(cli.COMMANDS[command].config)
    rows = [row for row in configs.describe_keys(config) if row[0] != "output"]
    said = [row[0] for row in rows if "Hugging Face dir" in row[3] or "Hugging Face checkpoint" in row[3] or "HF dir" in row[3]]
    assert hub.names_models(config) == bool(said)


def test_several_models_of_a_config_are_all_found():
    data = {"path": "a"}
    models = {"models": {"one": "a/b", "two": "c"}, "output": "o", "perplexity": {"data": data}, "kl": {"teacher": "d/e"}}
    config = configs.build(cli._load("evals.config:EvalConfig"), models, "here")
    assert list(hub.sources_of(config)) == [("a/b", "weights"), ("c", "weights"), ("d/e", "weights")]
    config = configs.build(cli._load("operations.plan.config:PlanConfig"), {"student": "a/b", "teacher": "c/d"}, "here")
    assert list(hub.sources_of(config)) == [("a/b", "config"), ("c/d", "config")]  # not the weights of the teacher, as a run would read


@pytest.fixture
def remote(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The model on a hub, with copies in other formats beside it; nothing in the cache."""
    served = Hub(model, NEW)
    served.files |= {"pytorch_model.bin": b"x" * 64, "original/model.safetensors": b"x", "consolidated.safetensors": b"x", "a.pth": b"x"}
    with serving(served):
        use_cache(monkeypatch, tmp_path / "hub", served.endpoint)
        yield served


def shards_of(served: Hub) -> list[str]:
    return sorted(name for name in served.files if name.startswith("model-"))


def test_a_download_is_of_the_files_that_are_read(remote: Hub, model: Path):
    hub.download(NAME, "config")
    assert remote.downloaded() == ["config.json"]
    hub.download(NAME, "weights")
    assert sorted(remote.downloaded()) == sorted(file.name for file in model.iterdir())
    assert CheckpointIndex.open(NAME).fingerprint() == CheckpointIndex.open(model).fingerprint()
    hub.download(NAME, "weights")
    assert len(remote.asked) == len(set(remote.downloaded()))


def test_a_connection_that_breaks_goes_on_where_it_was(remote: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # whole chunks are kept, of 10 MB otherwise
    shard = shards_of(remote)[0]
    remote.cut[shard] = 100_000
    hub.download(NAME, "weights")
    assert [wanted for name, wanted in remote.asked if name == shard] == [None, "bytes=100000-"]
    assert (hub.located(NAME) / shard).read_bytes() == remote.files[shard]


def test_a_download_that_failed_goes_on_with_what_is_missing(remote: Hub, model: Path):
    lacking = shards_of(remote)[-1]
    remote.down.add(lacking)
    with pytest.raises(UserError, match="can not be downloaded") as refused:
        hub.download(NAME, "weights")
    assert "what has come stays" in refused.value.do
    remote.down.clear()
    before = len(remote.asked)
    hub.download(NAME, "weights")
    assert remote.downloaded()[before:] == [lacking]
    assert CheckpointIndex.open(NAME).fingerprint() == CheckpointIndex.open(model).fingerprint()


def test_processes_of_a_node_download_once(remote: Hub, model: Path):
    threads = [threading.Thread(target=hub.download, args=(NAME, "weights")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(remote.downloaded()) == sorted(file.name for file in model.iterdir())


def test_an_inspection_reads_headers_alone(remote: Hub, model: Path):
    facts = inspect(InspectConfig(source=NAME, download=True))
    wanted = inspect(InspectConfig(source=str(model)))
    assert all((name, wanted_range) == (name, "bytes=0-100000") for name, wanted_range in remote.asked if name in shards_of(remote))
    assert not list(hub.located(NAME).glob("*.safetensors"))
    assert facts.pop("revision") == {"name": NAME, "commit": NEW}
    assert facts["fingerprint"] is None
    assert {**facts, "source": wanted["source"], "fingerprint": wanted["fingerprint"]} == wanted


@pytest.mark.parametrize("source", ["someone/absent", f"{NAME}@v2"])
def test_what_the_hub_does_not_have_is_said(remote: Hub, source: str):
    with pytest.raises(UserError, match=rf"{source} can not be downloaded: .*(Not Found|404)"):
        hub.download(source, "weights")


def test_a_command_downloads_where_it_is_told_to(remote: Hub, tmp_path: Path, user_error, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.txt").write_text("once upon a time")
    arguments = ["data", f"source={tmp_path / 'text.txt'}", f"tokenizer={NAME}", f"output={tmp_path / 'tokens'}", "append_eod=false"]
    assert "--download" in user_error(*arguments)
    cli.main([*arguments, "--download"])
    assert (tmp_path / "tokens.bin").exists()
    assert not list(hub.located(NAME).glob("*.safetensors"))
    assert "option '--download'" in user_error("score", "statistics=absent", "--download")
    capsys.readouterr()


def test_offline_is_respected(remote: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="can not be downloaded") as refused:
        hub.download(NAME, "weights")
    assert "HF_HUB_OFFLINE" in refused.value.do
    assert not remote.asked


def test_a_run_is_known_by_what_a_name_stands_for(cache: Path):
    assert identity({"source": NAME}) == identity({"source": str(hub.located(f"{NAME}@{NEW}"))})
    assert identity({"source": "someone/else"}) == {"source": "someone/else"}
