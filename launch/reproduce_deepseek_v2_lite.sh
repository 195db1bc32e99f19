#!/usr/bin/env bash
# The paper's rows for DeepSeek-V2-Lite, 0.3B tokens of distillation each, on a node of 8 x H100. Not run by us: it takes GPUs.
# The student has 2,659,708,416 parameters in every row. Expected averages (paper), row = scoring and K:
#
#              K = 6 (pure pruning)   K = 12 into 6
#   do_acp     42.39                  41.07
#   acp        40.37                  40.93
#   sf         40.04                  41.16
#   cp         38.07                  40.53
#
# The average is that of WinoGrande (5 shots), HellaSwag (10), ARC-easy (25), ARC-challenge (25) and MMLU (5).
# Weights: Hugging Face deepseek-ai/DeepSeek-V2-Lite. Text: HuggingFaceFW/fineweb-edu, folder sample/10BT. Environment: launch/reproduce.sh.
#   SOURCE=models/DeepSeek-V2-Lite ROWS="do_acp_k6 sf_k6" launch/reproduce_deepseek_v2_lite.sh logging.tensorboard=true
set -euo pipefail

export RECIPE=deepseek_v2_lite ACTIVE=6
export SOURCE=${SOURCE:-models/DeepSeek-V2-Lite} TEXT=${TEXT:-data/fineweb-edu/sample/10BT} OUT=${OUT:-out/$RECIPE}
export ROWS=${ROWS:-do_acp_k6 acp_k6 sf_k6 cp_k6 do_acp_k12 acp_k12 sf_k12 cp_k12}
exec "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" "$@"
