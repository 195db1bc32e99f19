#!/usr/bin/env bash
# The paper's comparison at pico scale (docs/study.md): five ways to begin the same student, the same distillation tokens, three seeds.
# About an hour on two CPU cores, and another for the dense teacher where it is not there yet. Stopped at any point, the same command goes
# on; finished arms are kept. Hyperparameters are in studies/yaml_configs/study. Arguments are passed on to distill, as key.path=value.
#
#   OUT                everything is written here                 SEEDS       "0 1 2"
#   DENSE_TEACHER      a trained dense teacher; made in OUT/dense_teacher where it is not there
#   PRETRAIN_SETTINGS  key.path=value ... for its training        PROCESSES   data-parallel processes of that training, 2
#   JOBS               arms at a time, each in one process, 2
#   SAMPLE_SETTINGS    key.path=value ... for calibrate and prune-dense
#   TASK_SETTINGS      key.path=value ... for make-task           REPORT      the document with the tables, docs/study.md
#   EVAL_SETTINGS      key.path=value ... for eval
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/resumable.sh
source launch/resumable.sh
# shellcheck source=studies/parallel.sh
source studies/parallel.sh

make -s .venv/.installed-dev
moe2dense=.venv/bin/moe2dense
configs=studies/yaml_configs/study
moe=examples/pico_moe/model
out=${OUT:-out/study}
dense_teacher=${DENSE_TEACHER:-$out/dense_teacher}
read -ra seeds <<< "${SEEDS:-0 1 2}"
read -ra pretrain_settings <<< "${PRETRAIN_SETTINGS:-}"
read -ra sample_settings <<< "${SAMPLE_SETTINGS:-}"
read -ra task_settings <<< "${TASK_SETTINGS:-}"
read -ra eval_settings <<< "${EVAL_SETTINGS:-}"
settings=("$@")
export GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES="" PYTHONWARNINGS=ignore OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1

build_dense_teacher() {
    if [[ ! -e out/pico_build/train.idx && ${PRETRAIN_SETTINGS:-} != *data.path=* ]]; then
        STOP_AFTER=tokens launch/build_pico_moe.sh  # the MoE's training tokens are too many for the repository
    fi
    mkdir -p "$out/dense_initial"
    cp examples/pico_moe/build/dense_config.json "$out/dense_initial/config.json"
    cp $moe/tokenizer* "$out/dense_initial/"
    unless_trained "$out/dense_pretrain" .venv/bin/torchrun --nproc-per-node "${PROCESSES:-2}" --master-addr 127.0.0.1 \
        --master-port "${MASTER_PORT:-29527}" -m megatron_moe2dense distill $configs/pretrain_dense.yaml \
        student="$out/dense_initial" output="$out/dense_pretrain" "${pretrain_settings[@]}"
    ended "$out/dense_pretrain"
    $moe2dense export checkpoint="$out/dense_pretrain" output="$dense_teacher"
}

convert() { # scoring, seed, arguments of convert
    unless_there "$out/seed_$2/$1/dense" $moe2dense convert $configs/convert.yaml statistics="$out/seed_$2/statistics" \
        output="$out/seed_$2/$1/dense" score.method="$1" "${@:3}"
}

prune() { # seed
    unless_there "$out/seed_$1/d2d/dense" $moe2dense prune-dense $configs/prune_dense.yaml source="$dense_teacher" \
        output="$out/seed_$1/d2d/dense" data.seed="$1" "${sample_settings[@]}"
}

arm() { # name, seed, arguments of distill
    local dir=$out/seed_$2/$1
    unless_trained "$dir/run" $moe2dense distill $configs/distill.yaml output="$dir/run" train.seed="$2" "${@:3}" "${settings[@]}"
    ended "$dir/run"
    unless_there "$dir/export" $moe2dense export checkpoint="$dir/run" output="$dir/export"
}

measure() { # records, label: directory ..., teacher of the KL, more of eval
    unless_there "$1" $moe2dense eval $configs/eval.yaml models="{$2}" output="$1.part" kl.teacher="$3" "${@:4}" "${eval_settings[@]}"
    [[ -e $1 ]] || mv "$1.part" "$1"  # eval goes on with an unfinished file, so it counts only under its own name
}

begin() { # seed: its statistics and students
    unless_there "$out/seed_$1/statistics" $moe2dense calibrate $configs/calibrate.yaml output="$out/seed_$1/statistics" \
        data.seed="$1" "${sample_settings[@]}"
    convert do_acp "$1"
    convert sf "$1" keep=8 group.method=weight_cluster  # K = 2 G, the paper's baseline of selection frequency
}

task=harness.tasks="[$out/task/continuation.yaml]"
beside unless_there "$out/task" $moe2dense make-task $configs/task.yaml output="$out/task" "${task_settings[@]}"
[[ -e $dense_teacher ]] || build_dense_teacher
finish
beside measure "$out/teachers.jsonl" "moe: $moe, dense: $dense_teacher" $moe "$task"
for seed in "${seeds[@]}"; do
    beside begin "$seed"
    beside prune "$seed"
done
finish
for seed in "${seeds[@]}"; do
    dense=$out/seed_$seed/do_acp/dense
    beside arm d2d "$seed" student="$out/seed_$seed/d2d/dense" teacher="$dense_teacher"
    beside arm do_acp "$seed" student="$dense"
    beside arm sf "$seed" student="$out/seed_$seed/sf/dense"
    beside arm random_ffn "$seed" student="$dense" initialize=random_ffn
    beside arm random "$seed" student="$dense" initialize=random
done
finish
for seed in "${seeds[@]}"; do
    models=""
    for name in do_acp sf d2d random_ffn random; do
        models+="$name: $out/seed_$seed/$name/export, "
    done
    beside measure "$out/seed_$seed/records.jsonl" "${models%, }" $moe "$task"
    beside measure "$out/seed_$seed/own_teacher.jsonl" "d2d: $out/seed_$seed/d2d/export" "$dense_teacher" harness=null
done
finish
.venv/bin/python -m studies.study_report "$out" "${REPORT:-docs/study.md}"
