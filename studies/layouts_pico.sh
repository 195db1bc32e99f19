#!/usr/bin/env bash
# The example's student distilled on the same tokens in four layouts: one process, TP2 (with sequence parallelism), PP2, TP2 x PP2.
# Which samples a step reads does not depend on the layout, so the curves have to lie on each other; the figure shows whether they do.
# Everything is written to out/layouts. Arguments are passed on to distill: studies/layouts_pico.sh train.steps=40
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=.venv/bin
moe2dense=$bin/moe2dense
configs=yaml_configs/quickstart
out=out/layouts
export GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES="" PYTHONWARNINGS=ignore OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1

distill() { # name, processes, settings
    $bin/torchrun --nproc-per-node "$2" --master-addr 127.0.0.1 --master-port "${MASTER_PORT:-29519}" -m megatron_moe2dense distill \
        $configs/distill.yaml student=$out/student output="$out/$1" train.steps=100 train.eval_every=25 train.save_every=50 "${@:3}"
}

make -s .venv/.installed-train-plot
rm -rf "$out"
$moe2dense calibrate $configs/calibrate.yaml output=$out/statistics
$moe2dense convert $configs/convert.yaml statistics=$out/statistics output=$out/student
distill TP1 1 "$@"
distill TP2_SP 2 parallel.tensor=2 parallel.sequence=true "$@"
distill PP2 2 parallel.pipeline=2 "$@"
distill TP2_PP2 4 parallel.tensor=2 parallel.pipeline=2 "$@"
$moe2dense plot "records=[$out/TP1,$out/TP2_SP,$out/PP2,$out/TP2_PP2]" output=$out/figures
