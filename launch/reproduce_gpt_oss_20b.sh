#!/usr/bin/env bash
# The paper's rows for gpt-oss-20b, 0.3B tokens of distillation each, on a node of 8 x H100. Not run by us: it takes GPUs.
# The student has 4,185,089,880 parameters in every row. Expected averages (paper), row = scoring and K:
#
#              K = 4 (pure pruning)   K = 8 into 4
#   do_acp     33.71                  32.11
#   acp        33.36                  32.82
#   sf         32.15                  31.72
#   cp         32.86                  31.49
#
# The average is that of WinoGrande (5 shots), HellaSwag (10), ARC-easy (25), ARC-challenge (25) and MMLU (5).
# Weights: Hugging Face openai/gpt-oss-20b. Text: HuggingFaceFW/fineweb-edu, folder sample/10BT. Environment: launch/reproduce.sh.
#   SOURCE=models/gpt-oss-20b ROWS="do_acp_k4 sf_k4" launch/reproduce_gpt_oss_20b.sh logging.tensorboard=true
set -euo pipefail

export RECIPE=gpt_oss_20b ACTIVE=4
export SOURCE=${SOURCE:-models/gpt-oss-20b} TEXT=${TEXT:-data/fineweb-edu/sample/10BT} OUT=${OUT:-out/$RECIPE}
export ROWS=${ROWS:-do_acp_k4 acp_k4 sf_k4 cp_k4 do_acp_k8 acp_k8 sf_k8 cp_k8}
exec "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" "$@"
