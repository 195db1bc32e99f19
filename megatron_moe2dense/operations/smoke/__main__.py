"""`python -m megatron_moe2dense.operations.smoke [OUTPUT]`, what launch/gpu_smoke.sh runs; from the top of the repository."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_moe2dense.operations.smoke.run import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/gpu_smoke")))
