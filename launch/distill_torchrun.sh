#!/usr/bin/env bash
# Distillation on this node, or this node's part of it: launch/distill_torchrun.sh CONFIG.yaml [key.path=value ...]
# The environment says where and how: launch/node.sh. Without Slurm, on each of two nodes:
#   NODES=2 NODE_RANK=0 RDZV_ENDPOINT=HOST:29500 RDZV_ID=first LOG_DIR=SHARED launch/distill_torchrun.sh CONFIG.yaml
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" distill "$@"
