"""The store in which the torchrun agents of several nodes meet: python rendezvous.py PORT serves until it is ended."""

from __future__ import annotations

import signal
import sys

from torch.distributed import TCPStore


def main(port: int) -> None:
    """Serve; torchrun's agents find it under --rdzv-endpoint HOST:PORT with --rdzv-conf is_host=0."""
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del store


if __name__ == "__main__":
    main(int(sys.argv[1]))
