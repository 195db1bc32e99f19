"""Models by their name on the Hugging Face Hub, `owner/name[@revision]`: found in the local cache as huggingface_hub lays it out, and
downloaded into it where a command is told to. HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_moe2dense.common.config import Config, block_type
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import read_json

# What of a model a command reads: config.json alone, the small files (tokenizer and processors too), or the weights with them.
Need = Literal["config", "small", "weights"]
DEFAULT_REVISION = "main"
INDEX_FILE = "model.safetensors.index.json"
_SMALL = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_IN_FOLDERS = ("*/*",)  # other formats of the same weights: original/, onnx/
_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_FILES = (".json", ".model", ".yaml", ".yml", ".safetensors")
_EXPECTED = "a folder or file that is here, or a model in the cache by its name on the Hugging Face Hub, owner/name[@revision]"


@dataclass(frozen=True)
class Source:
    """Marks a config field (in its Annotated metadata) whose values are models: folders, or names. need: what of them is read."""

    need: Need = "weights"


@dataclass(frozen=True)
class Named:
    """A model on the Hub. revision: a branch, a tag or a commit."""

    name: str
    revision: str

    @classmethod
    def parse(cls, source: str | Path) -> Named | None:
        """None for what is here, and for what can only be a path."""
        match = _NAME.fullmatch(str(source))
        if match is None or Path(source).exists() or str(source).endswith(_FILES):
            return None
        return cls(match["name"], match["revision"] or DEFAULT_REVISION)

    def snapshot(self, patterns: tuple[str, ...], local: bool) -> Path:
        """The folder of its files of these names, local: as they are in the cache. Raises what huggingface_hub raises."""
        from huggingface_hub import snapshot_download

        kept = {"allow_patterns": list(patterns), "ignore_patterns": list(_IN_FOLDERS)}
        return Path(snapshot_download(self.name, revision=self.revision, local_files_only=local, **kept))


def located(source: str | Path) -> Path:
    """Where a model is: the path itself, or the folder of that name and revision in the cache. Nothing is downloaded.

    Raises:
        UserError: a name, and neither a path nor in the cache.
    """
    named = Named.parse(source)
    if named is None:
        return Path(source)
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return named.snapshot(("config.json",), local=True)
    except LocalEntryNotFoundError:
        revision = "" if named.revision == DEFAULT_REVISION else f" --revision {named.revision}"
        raise UserError(
            f"{source}: no folder or file of that path, and no model {named.name} of revision {named.revision} in {constants.HF_HUB_CACHE}",
            _EXPECTED,
            f"check the path; or get the model: add --download to this command, or run `hf download {named.name}{revision}`",
        ) from None


def revision_of(directory: Path) -> dict[str, dict[str, str]]:
    """Of a folder of the cache, by its place there: `revision`, its model's name and commit, for manifests. Empty for any other."""
    snapshots, model = directory.parent, directory.parent.parent.name
    if snapshots.name != "snapshots" or not model.startswith("models--"):
        return {}
    return {"revision": {"name": model.removeprefix("models--").replace("--", "/", 1), "commit": directory.name}}


def advice(directory: Path) -> str:
    """How to get what a checkpoint's folder lacks."""
    return "add --download to this command, which gets what is missing" if revision_of(directory) else "download the checkpoint again"


def download(source: str | Path, need: Need) -> None:
    """Bring what is needed of a model into the cache, files that are there as they are; nothing to do for a path.

    Raises:
        UserError: no such model or revision, no access to it, no network.
    """
    named = Named.parse(source)
    if named is None:
        return
    with _taking_turns(named), _user_errors(source):
        folder = named.snapshot(("config.json",) if need == "config" else _SMALL, local=False)
        if need == "weights":
            index = folder / INDEX_FILE
            shards = read_json(index, "a safetensors index").get("weight_map", {}).values() if index.exists() else ()
            names = sorted({name for name in shards if isinstance(name, str)}) or ["model.safetensors"]
            Named(named.name, folder.name).snapshot(tuple(names), local=False)


def headers(source: str | Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(file, tensor, its entry in the header) of a model's weights, of which no more than the headers is read over the network.

    Raises:
        UserError: as `download`; no weights in safetensors format.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    named = Named.parse(source)
    assert named is not None, "a model by its name"
    try:
        with _user_errors(source):
            commit = located(source).name
            found = HfApi().get_safetensors_metadata(named.name, revision=commit)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise UserError(
            f"{source}: {error}", "a model with weights in safetensors format", "choose another revision, or convert it"
        ) from None
    for file, content in found.files_metadata.items():
        for name, info in content.tensors.items():
            yield file, name, {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}


def sources_of(config: Config) -> Iterator[tuple[str, Need]]:
    """The models that a config names, with what is read of each; a mark of a block goes before those inside it."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Source)]
        if isinstance(value, Config):
            for source, need in sources_of(value):
                yield source, marks[0].need if marks else need
        elif marks and value is not None:
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for each in values:
                yield str(each), marks[0].need


def names_models(cls: type[Config]) -> bool:
    """Whether a config of this class can name a model."""
    fields = cls.model_fields.values()
    blocks = (block_type(field.annotation) for field in fields)
    return any(isinstance(mark, Source) for field in fields for mark in field.metadata) or any(map(names_models, filter(None, blocks)))


@contextlib.contextmanager
def _taking_turns(named: Named) -> Iterator[None]:
    """Processes that want the same model, as those of torchrun, one after the other: the first downloads, the others find it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    place = Path(constants.HF_HUB_CACHE) / ".locks" / repo_folder_name(repo_id=named.name, repo_type="model")
    place.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(place / "moe2dense.lock"):
        yield


@contextlib.contextmanager
def _user_errors(source: str | Path) -> Iterator[None]:
    # The base of what its HTTP client raises, whichever that is: httpx in some versions, httpx2 in others.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except (OSError, HTTPError) as error:
        found = str(error).strip().splitlines() or [type(error).__name__]
        do = "check name, revision, network (HF_HUB_OFFLINE, HF_ENDPOINT); `hf auth login` where access is asked for; what has come stays"
        raise UserError(f"{source} can not be downloaded: {found[0]}", "a model that the Hub gives", do) from None
