#!/usr/bin/env bash
# Beyond the paper at pico scale (docs/beyond.md): dense models by surgery alone, then what is left of their lead after distillation with
# AdamW and Muon at several budgets. About three hours on two CPU cores; STOP_AFTER=inits ends after the first table, in a quarter of an
# hour. Stopped at any point, the same command goes on; finished runs are kept. Hyperparameters are in yaml_configs/beyond and here.
#
#   OUT      everything is written here      SEEDS    "0 1 2"           JOBS   runs at a time, each in one process, 2
#   REPORT   the document with the tables, docs/beyond.md                STOP_AFTER   inits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/resumable.sh
source launch/resumable.sh
# shellcheck source=launch/parallel.sh
source launch/parallel.sh

make -s .venv/.installed-train-plot
moe2dense=.venv/bin/moe2dense
configs=yaml_configs/beyond
moe=examples/pico_moe/model
tokens=examples/pico_moe/tokens
out=${OUT:-out/beyond}
read -ra seeds <<< "${SEEDS:-0 1 2}"
export GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES="" PYTHONWARNINGS=ignore OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1

text() { # seed
    echo "data.path=$tokens/distill data.sequence_length=256 data.sequences=512 data.seed=$1"
}

statistics() { # seed
    # shellcheck disable=SC2046
    unless_there "$out/seed_$1/statistics" $moe2dense calibrate source=$moe output="$out/seed_$1/statistics" $(text "$1")
}

convert() { # seed, name, options
    unless_there "$out/seed_$1/inits/$2" $moe2dense convert source=$moe output="$out/seed_$1/inits/$2" "${@:3}"
}

refits() { # seed, name, options: its down projections as they are, solved in either mode, and the whole FFNs trained
    local options=("${@:3}") text_of
    read -ra text_of <<< "$(text "$1")"
    convert "$1" "$2" "${options[@]}"
    convert "$1" "$2-parallel" "${options[@]}" "${text_of[@]}" refit.mode=parallel
    convert "$1" "$2-sequential" "${options[@]}" "${text_of[@]}" refit.mode=sequential
    convert "$1" "$2-reconstructed" "${options[@]}" "${text_of[@]}" refit.mode=sequential refit.reconstruct="{epochs: 24, lr: 6e-3}"
}

neurons() { # seed, method, options of select
    local dir=$out/seed_$1
    unless_there "$dir/select_$2" $moe2dense select source=$moe statistics="$dir/statistics" output="$dir/select_$2" select.method="$2" "${@:3}"
}

mkdir -p "$out"
for seed in "${seeds[@]}"; do beside statistics "$seed"; done
finish
read -ra sample <<< "$(text 0)"
neurons 0 energy
neurons 0 ols "${sample[@]}"
beside refits 0 do_acp statistics="$out/seed_0/statistics" score.method=do_acp
beside refits 0 mp statistics="$out/seed_0/statistics" score.method=mp scale.method=proportional
beside refits 0 energy plan="$out/seed_0/select_energy/plan.json"
beside refits 0 ols plan="$out/seed_0/select_ols/plan.json"
finish
models="moe: $moe"
for name in do_acp mp energy ols; do
    for refit in "" -parallel -sequential -reconstructed; do models+=", $name$refit: $out/seed_0/inits/$name$refit"; done
done
unless_there "$out/initial.jsonl" $moe2dense eval models="{$models}" output="$out/initial.part.jsonl" kl.teacher=$moe device=cpu \
    perplexity.data.path=$tokens/heldout perplexity.data.sequence_length=256
[[ -e $out/initial.jsonl ]] || mv "$out/initial.part.jsonl" "$out/initial.jsonl"  # eval goes on with an unfinished file
if [[ ${STOP_AFTER:-} == inits ]]; then
    .venv/bin/python -m launch.beyond_report "$out" "${REPORT:-docs/beyond.md}"
    exit
fi

tune() { # init, name, steps, settings: on seed 0, judged on 64 held-out sequences
    local dir=$out/seed_0/tune/$1.$2.$3
    unless_trained "$dir" $moe2dense distill $configs/distill.yaml student="$out/seed_0/inits/$1" output="$dir" train.steps="$3" \
        data.validation_sequences=64 "${@:4}"
    ended "$dir"
    rm -rf "$dir/checkpoints"
}

fours=(batch.global=4 batch.micro=4)
for lr in 3e-3 6e-3 1e-2; do beside tune do_acp adamw-$lr 150 optim.muon=null optim.lr=$lr; done
for lr in 3e-3 6e-3; do beside tune ols-sequential adamw-$lr 150 optim.muon=null optim.lr=$lr; done
for lr in 3e-3 6e-3 1e-2; do beside tune ols-sequential muon-$lr 150 optim.muon.lr=$lr optim.lr=3e-3; done
beside tune do_acp muon-3e-3 150 optim.muon.lr=3e-3 optim.lr=3e-3
beside tune do_acp adamw-2e-3-batch4 600 optim.muon=null optim.lr=2e-3 "${fours[@]}"
for lr in 2e-3 4.5e-3; do beside tune do_acp adamw-$lr 450 optim.muon=null optim.lr=$lr; done
beside tune do_acp adamw-2e-3-batch4 1800 optim.muon=null optim.lr=2e-3 "${fours[@]}"
convert 0 ols-reconstructed-8 plan="$out/seed_0/select_ols/plan.json" "${sample[@]}" refit.mode=sequential \
    refit.reconstruct="{epochs: 8, lr: 3e-3}"
beside tune ols-reconstructed-8 adamw-3e-3 150 optim.muon=null optim.lr=3e-3
beside tune ols-reconstructed-8 muon-6e-3-adamw-3e-3 150 optim.lr=3e-3
beside tune ols-reconstructed-8 muon-6e-3-adamw-3e-3-batch4 600 optim.lr=3e-3 "${fours[@]}"
convert 0 ols-reconstructed-3e-3 plan="$out/seed_0/select_ols/plan.json" "${sample[@]}" refit.mode=sequential \
    refit.reconstruct="{epochs: 24, lr: 3e-3}"
for lr in 6e-3 3e-3 2e-3 1e-3; do beside tune ols-reconstructed-3e-3 muon-6e-3-adamw-$lr 150 optim.lr=$lr; done
finish

arm() { # seed, init, name, steps, settings
    local dir=$out/seed_$1/arms/$2.$3.$4
    unless_trained "$dir" $moe2dense distill $configs/distill.yaml student="$out/seed_$1/inits/$2" output="$dir" train.steps="$4" \
        train.seed="$1" "${@:5}"
    ended "$dir"
    rm -rf "$dir/checkpoints"
}

start() { # seed: its best dense model before distillation, and DO-ACP's
    local sample dir=$out/seed_$1
    read -ra sample <<< "$(text "$1")"
    neurons "$1" ols "${sample[@]}"
    unless_there "$dir/inits/ols-long" $moe2dense convert $configs/convert.yaml plan="$dir/select_ols/plan.json" output="$dir/inits/ols-long" \
        data.seed="$1"
    convert "$1" do_acp statistics="$dir/statistics" score.method=do_acp
}

for seed in "${seeds[@]}"; do beside start "$seed"; done
finish
for init in do_acp energy ols; do beside arm 0 $init-reconstructed muon 150; done
for seed in "${seeds[@]}"; do
    for steps in 150 450; do
        beside arm "$seed" do_acp adamw $steps optim.muon=null optim.lr=4.5e-3
        beside arm "$seed" ols-long muon $steps
    done
    beside arm "$seed" ols-long muon 75
done
finish
.venv/bin/python -m launch.beyond_report "$out" "${REPORT:-docs/beyond.md}"
