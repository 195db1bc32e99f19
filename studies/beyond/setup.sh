#!/usr/bin/env bash
# Sourced by the parts of studies/beyond_pico.sh: where things are, and the steps that several parts take.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=launch/resumable.sh
source launch/resumable.sh
# shellcheck source=studies/parallel.sh
source studies/parallel.sh

make -s .venv/.installed-train-plot
moe2dense=.venv/bin/moe2dense
configs=studies/yaml_configs/beyond
moe=examples/pico_moe/model
tokens=examples/pico_moe/tokens
out=${OUT:-out/beyond}
export GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES="" PYTHONWARNINGS=ignore OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
mkdir -p "$out"

sample() { # seed: sets `text`, the windows that everything before distillation reads
    text=("data.path=$tokens/distill" data.sequence_length=256 data.sequences=512 "data.seed=$1")
}

statistics() { # seed
    local text
    sample "$1"
    unless_there "$out/seed_$1/statistics" $moe2dense calibrate source=$moe output="$out/seed_$1/statistics" "${text[@]}"
}

neurons() { # seed, method
    local dir=$out/seed_$1 text=()
    [[ $2 == energy ]] || sample "$1"
    unless_there "$dir/select_$2" $moe2dense select source=$moe statistics="$dir/statistics" output="$dir/select_$2" select.method="$2" "${text[@]}"
}

convert() { # seed, name, options
    unless_there "$out/seed_$1/inits/$2" $moe2dense convert source=$moe output="$out/seed_$1/inits/$2" "${@:3}"
}

refitted() { # seed, name, options, of refit too
    local text
    sample "$1"
    convert "$@" "${text[@]}"
}

sequential() { # seed, name, options
    refitted "$1" "$2-sequential" "${@:3}" refit.mode=sequential
}

reconstruction="{epochs: 24, lr: 6e-3}"
reconstructed() { # seed, name, options
    refitted "$1" "$2-reconstructed" "${@:3}" refit.mode=sequential refit.reconstruct="$reconstruction"
}

reconstructed_neurons() { # seed: what the recipe begins with
    statistics "$1"
    neurons "$1" ols
    unless_there "$out/seed_$1/inits/ols-long" $moe2dense convert $configs/convert.yaml plan="$out/seed_$1/select_ols/plan.json" \
        output="$out/seed_$1/inits/ols-long" data.seed="$1"
}

distilled() { # directory, settings
    unless_trained "$1" $moe2dense distill $configs/distill.yaml output="$1" "${@:2}"
    ended "$1"
    rm -rf "$1/checkpoints"
}

judged() { # records, NAME: MODEL, ... on the held-out text
    local part=${1%.jsonl}.part.jsonl
    unless_there "$1" $moe2dense eval models="{$2}" output="$part" kl.teacher="${3:-$moe}" device=cpu \
        perplexity.data.path=$tokens/heldout perplexity.data.sequence_length=256
    [[ -e $1 ]] || mv "$part" "$1"  # eval goes on with an unfinished file
}
