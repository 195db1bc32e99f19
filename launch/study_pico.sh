#!/usr/bin/env bash
# The paper's comparison at pico scale (docs/study.md): five ways to begin the same student, the same distillation tokens, three seeds.
# About an hour on two CPU cores, and another for the dense teacher where it is not there yet. Stopped at any point, the same command goes
# on; finished arms are kept. Hyperparameters are in yaml_configs/study. Arguments are passed on to distill, as key.path=value.
#
#   OUT                everything is written here                 SEEDS       "0 1 2"
#   DENSE_TEACHER      a trained dense teacher; made in OUT/dense_teacher where it is not there
#   PRETRAIN_SETTINGS  key.path=value ... for its training        PROCESSES   data-parallel processes, 2
#   SAMPLE_SETTINGS    key.path=value ... for calibrate and prune-dense
#   EVAL_SETTINGS      key.path=value ... for eval                REPORT      the document with the tables, docs/study.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/resumable.sh
source launch/resumable.sh

make -s .venv/.installed-dev
moe2dense=.venv/bin/moe2dense
configs=yaml_configs/study
moe=examples/pico_moe/model
out=${OUT:-out/study}
dense_teacher=${DENSE_TEACHER:-$out/dense_teacher}
read -ra seeds <<< "${SEEDS:-0 1 2}"
read -ra pretrain_settings <<< "${PRETRAIN_SETTINGS:-}"
read -ra sample_settings <<< "${SAMPLE_SETTINGS:-}"
read -ra eval_settings <<< "${EVAL_SETTINGS:-}"
settings=("$@")
export GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES="" PYTHONWARNINGS=ignore OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1

train() { # output, arguments of distill
    unless_trained "$1" .venv/bin/torchrun --nproc-per-node "${PROCESSES:-2}" --master-addr 127.0.0.1 \
        --master-port "${MASTER_PORT:-29527}" -m megatron_moe2dense distill "${@:2}" output="$1"
}

build_dense_teacher() {
    if [[ ! -e out/pico_build/train.idx && ${PRETRAIN_SETTINGS:-} != *data.path=* ]]; then
        STOP_AFTER=tokens launch/build_pico_moe.sh  # the MoE's training tokens are too many for the repository
    fi
    mkdir -p "$out/dense_initial"
    cp examples/pico_moe/build/dense_config.json "$out/dense_initial/config.json"
    cp $moe/tokenizer* "$out/dense_initial/"
    train "$out/dense_pretrain" $configs/pretrain_dense.yaml student="$out/dense_initial" "${pretrain_settings[@]}"
    $moe2dense export checkpoint="$out/dense_pretrain" output="$dense_teacher"
}

arm() { # name, seed, arguments of distill
    local dir=$out/seed_$2/$1
    train "$dir/run" $configs/distill.yaml train.seed="$2" "${@:3}" "${settings[@]}"
    unless_there "$dir/export" $moe2dense export checkpoint="$dir/run" output="$dir/export"
}

measure() { # records, label: directory ..., teacher of the KL
    unless_there "$1" $moe2dense eval $configs/eval.yaml models="{$2}" output="$1.part" kl.teacher="$3" \
        harness.tasks="[$out/task/continuation.yaml]" "${eval_settings[@]}"
    [[ -e $1 ]] || mv "$1.part" "$1"  # eval goes on with an unfinished file, so it counts only under its own name
}

[[ -e $dense_teacher ]] || build_dense_teacher
unless_there "$out/task" $moe2dense make-task $configs/task.yaml output="$out/task"
measure "$out/teachers.jsonl" "moe: $moe, dense: $dense_teacher" $moe
for seed in "${seeds[@]}"; do
    dir=$out/seed_$seed
    unless_there "$dir/statistics" $moe2dense calibrate $configs/calibrate.yaml output="$dir/statistics" \
        data.seed="$seed" "${sample_settings[@]}"
    for name in do_acp sf; do
        unless_there "$dir/$name/dense" $moe2dense convert $configs/convert_$name.yaml statistics="$dir/statistics" \
            output="$dir/$name/dense"
        arm $name "$seed" student="$dir/$name/dense"
    done
    unless_there "$dir/d2d/dense" $moe2dense prune-dense $configs/prune_dense.yaml source="$dense_teacher" output="$dir/d2d/dense" \
        data.seed="$seed" "${sample_settings[@]}"
    arm d2d "$seed" student="$dir/d2d/dense" teacher="$dense_teacher"
    arm random_ffn "$seed" student="$dir/do_acp/dense" initialize=random_ffn
    arm random "$seed" student="$dir/do_acp/dense" initialize=random
    models=""
    for name in do_acp sf d2d random_ffn random; do
        models+="$name: $dir/$name/export, "
    done
    measure "$dir/records.jsonl" "${models%, }" $moe
    measure "$dir/own_teacher.jsonl" "d2d: $dir/d2d/export" "$dense_teacher"
done
.venv/bin/python launch/study_report.py "$out" "${REPORT:-docs/study.md}"
