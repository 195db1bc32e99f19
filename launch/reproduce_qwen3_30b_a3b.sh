#!/usr/bin/env bash
# The paper's main rows for Qwen3-30B-A3B, about 4B tokens of distillation each, on nodes of 8 x H100. Not run by us: it takes GPUs.
#
#   row          student                                         parameters      expected average (paper)
#   do_acp_k8    DO-ACP, K = 8, uniform scaling                  3,340,449,792   58.10
#   sf_k16       SF, K = 16 into 8 by weight clustering          3,340,449,792   53.46
#   d2d          Qwen3-32B pruned, distilled from Qwen3-32B      3,441,113,088   51.84
#   random_ffn   random FFNs, the teacher's attention            3,340,449,792   45.44
#
# The average is that of WinoGrande (5 shots), HellaSwag (10), ARC-easy (25), ARC-challenge (25) and MMLU (5).
# Weights: Hugging Face Qwen/Qwen3-30B-A3B, and Qwen/Qwen3-32B for d2d (DENSE).
# Text: HuggingFaceFW/fineweb-edu, folder sample/10BT. Environment: launch/reproduce.sh.
#   SOURCE=models/Qwen3-30B-A3B TEXT=data/fineweb-edu/sample/10BT launch/reproduce_qwen3_30b_a3b.sh logging.tensorboard=true
set -euo pipefail

export RECIPE=qwen3_30b_a3b ACTIVE=8 CONTROL=do_acp_k8
export SOURCE=${SOURCE:-models/Qwen3-30B-A3B} TEXT=${TEXT:-data/fineweb-edu/sample/10BT} OUT=${OUT:-out/$RECIPE}
export DENSE=${DENSE:-models/Qwen3-32B} ROWS=${ROWS:-do_acp_k8 sf_k16 d2d random_ffn}
exec "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" "$@"
