"""The stand-in for triton while Megatron-Core is imported, on a false Megatron in a process without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    # as in 0.18: a hard import, decorated kernels, and imports of modules that look for triton themselves
    "megatron/core/transformer/moe/paged_stash.py": (
        "import triton\nimport triton.language as tl\nfrom megatron.core import optional\n"
        "@triton.jit\ndef kernel(size: tl.constexpr):\n    return size\n"
        "@triton.autotune(configs=[], key=[])\ndef tuned():\n    return 1\n"
    ),
    "megatron/core/optional.py": "try:\n    import triton\n    HAVE = True\nexcept ImportError:\n    HAVE = False\n",
}
SCRIPT = """
import sys
sys.path = [{root!r}, {folder!r}, *(place for place in sys.path if "-packages" not in place)]
import megatron_moe2dense.trainer
from megatron.core.transformer.moe import paged_stash
from megatron.core import optional
assert not optional.HAVE, "a module that can do without believes in triton"
assert paged_stash.kernel(3) == 3
assert not [name for name in sys.modules if name.startswith("triton")]
try:
    paged_stash.triton.language.store[1]
except RuntimeError as error:
    assert "needs triton" in str(error)
else:
    raise AssertionError("a launch without triton went through")
try:
    import triton
except ImportError:
    print("gone")
"""


def test_megatron_imports_without_triton_and_nothing_else_sees_one(tmp_path: Path):
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = SCRIPT.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "gone"


def test_an_installed_triton_is_used_as_it_is(tmp_path: Path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("REAL = True\n")
    folder = tmp_path / "megatron/core/transformer/moe"
    folder.mkdir(parents=True)
    (folder / "paged_stash.py").write_text("import triton\nREAL = triton.REAL\n")
    code = (
        f"import sys; sys.path = [{str(ROOT)!r}, {str(tmp_path)!r}, *(p for p in sys.path if '-packages' not in p)]\n"
        "import megatron_moe2dense.trainer\nfrom megatron.core.transformer.moe import paged_stash\n"
        "assert paged_stash.REAL is True and 'triton' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
