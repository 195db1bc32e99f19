#!/usr/bin/env bash
# Beyond the paper at pico scale (docs/beyond.md), in parts: arguments choose some, none means all of them, in this order.
# `tuning` and `lasting` begin with models of `initial`.
#
#   initial    dense models by surgery alone: chosen, refitted, reconstructed; a quarter of an hour on two CPU cores
#   tuning     learning rates and batch sizes, for both arms alike; two hours
#   factors    the recipe with one thing changed at a time; half an hour
#   lasting    KL over tokens, the recipe and DO-ACP, three seeds; two hours
#   choices    which property of the chosen neurons tells the KL after distillation; half an hour
#   automatic  `moe2dense auto` against the sweep of the same plans; half an hour
#   shared     a MoE with shared experts: down projections of theirs kept or refitted; half an hour
#
# Stopped at any point, the same command goes on; finished runs are kept. Hyperparameters are in studies/yaml_configs/beyond and studies/beyond.
#
#   OUT      everything is written here      SEEDS    "0 1 2", of `lasting`       JOBS   runs at a time, each in one process, 2
#   REPORT   the document with the tables, docs/beyond.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

parts=("$@")
((${#parts[@]})) || parts=(initial tuning factors lasting choices automatic shared)
for part in "${parts[@]}"; do
    "studies/beyond/$part.sh"
done
.venv/bin/python -m studies.beyond.report "${OUT:-out/beyond}" "${REPORT:-docs/beyond.md}"
