"""What hadolint (`make lint`) does not see of the images: they agree with the checkout they are built from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.distributed import ROOT
from tests.test_shipped_files import _targets

IMAGES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]


def instructions(image: str) -> list[tuple[str, str]]:
    """Name and arguments, in order."""
    lines = [line for line in (ROOT / image).read_text().replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_copies_what_is_there_and_ends_as_a_user_without_rights(image: str):
    found = instructions(image)
    sources = [word for name, rest in found if name == "COPY" for word in rest.split()[:-1] if not word.startswith("--")]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
    names = [name for name, _ in found]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert ("USER", "${USER_ID}") in found
    assert ("ARG", "USER_ID=1000") in found
    [folder] = [rest for name, rest in found if name == "WORKDIR"]
    assert Path(folder).name in (ROOT / "docs/operations.md").read_text(), "the documents mount out/ of that folder"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_takes_its_versions_from_the_projects_own_files(image: str):
    """Pins stand in setup.py and the Makefile alone; torch and Transformer Engine are those of the GPU base."""
    runs = " ".join(rest for name, rest in instructions(image) if name == "RUN")
    assert not re.search(r"\w==\d", runs)
    made = re.findall(r"make (\.\S+)", runs)
    assert set(made) == ({".venv/.installed-dev"} if image.endswith("cpu") else set())
    assert {"lint", "test"} <= _targets()
    assert re.search(r'"megatron-core==[\d.]+[";]', (ROOT / "setup.py").read_text())
