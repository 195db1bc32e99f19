"""How fast `moe2dense data` tokenises: prints `name value unit goal`."""

from __future__ import annotations

import contextlib
import io
import json
import sysconfig
import tempfile
import time
from pathlib import Path

from megatron_moe2dense.tokens import prepare
from megatron_moe2dense.tokens.config import DataConfig

TOKENIZER = Path(__file__).resolve().parents[1] / "examples/pico_moe/model"
GOAL = 1.0  # MB/s of one process with the pico model's tokenizer
LIMIT = 8_000_000  # bytes of Python source


def main() -> None:
    """Tokenise the standard library with one process."""
    with tempfile.TemporaryDirectory() as folder:
        source, size = Path(folder) / "source.jsonl", 0
        with source.open("w") as file:
            for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
                text = path.read_text(encoding="utf-8")
                if size < LIMIT:
                    size += file.write(json.dumps({"text": text}) + "\n")
        config = DataConfig(source=str(source), tokenizer=str(TOKENIZER), output=f"{folder}/out")
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            prepare.run(config)
        print(f"data_tokenise {size / 1e6 / (time.perf_counter() - start):.2f} MB/s {GOAL}")


if __name__ == "__main__":
    main()
