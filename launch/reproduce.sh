#!/usr/bin/env bash
# The commands of one recipe, row after row; launch/reproduce_<name>.sh call it and say what is expected. All hyperparameters are in
# yaml_configs/<name>. Stopped at any point, the same command goes on. Arguments are passed on to distill, as key.path=value.
#
#   RECIPE    folder of yaml_configs
#   SOURCE    Hugging Face directory of the MoE, with its tokenizer; nothing is downloaded here
#   TEXT      folder of parquet files: FineWeb-Edu sample-10BT
#   OUT       everything is written here
#   ROWS      rows to run: <scoring>_k<K>; random_ffn, the model of the row CONTROL with random FFNs; d2d, the pruned model DENSE
#   ACTIVE    groups of the dense FFN: the K of pure pruning; with more experts they are merged
#   LAUNCHER  starts calibrate and distill: launch/node.sh, all GPUs of this node; launch/srun.sh, those of the job's nodes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/resumable.sh
source launch/resumable.sh

: "${RECIPE:?is set by launch/reproduce_*.sh}" "${ACTIVE:?}" "${SOURCE:?}" "${TEXT:?}" "${OUT:?}" "${ROWS:?}"
configs=yaml_configs/$RECIPE
tokens=$OUT/tokens
read -ra rows <<< "$ROWS"
read -ra distributed <<< "${LAUNCHER:-launch/node.sh}"

distill_row() { # row, student, settings
    unless_trained "$OUT/$1/run" "${distributed[@]}" distill "$recipe" teacher="$teacher" student="$2" output="$OUT/$1/run" \
        data.path="$tokens" data.validation="${tokens}_validation" "${@:3}"
    ended "$OUT/$1/run" || exit 0
    unless_there "$OUT/$1/export" moe2dense export "$configs/export.yaml" checkpoint="$OUT/$1/run" output="$OUT/$1/export"
    unless_there "$OUT/$1/records.jsonl" moe2dense eval "$configs/eval.yaml" models="{$1: $OUT/$1/export}" output="$OUT/$1/records.jsonl" \
        kl.teacher="$teacher" perplexity.data.path="${tokens}_validation"
}

convert_row() { # row
    local keep=${1##*_k} settings=()
    # merged rows: weight clustering is the paper's for Qwen3 and (ours) for the others, uniform scaling (ours)
    [[ $keep == "$ACTIVE" ]] || settings=(group.method=weight_cluster)
    unless_there "$OUT/$1/dense" moe2dense convert "$configs/convert.yaml" source="$SOURCE" statistics="$OUT/statistics" \
        output="$OUT/$1/dense" score.method="${1%_k*}" keep="$keep" "${settings[@]}"
}

unless_there "$tokens.json" moe2dense data "$configs/data.yaml" source="$TEXT" tokenizer="$SOURCE" output="$tokens"
# What eval needs at the end, its tasks' data too, is looked up before hours of GPUs are spent.
unless_there "$OUT/statistics" moe2dense eval "$configs/eval.yaml" models="[$SOURCE]" output="$OUT/none" kl.teacher="$SOURCE" \
    perplexity.data.path="${tokens}_validation" --dry-run
unless_there "$OUT/statistics" "${distributed[@]}" calibrate "$configs/calibrate.yaml" source="$SOURCE" output="$OUT/statistics" \
    data.path="$tokens"
for row in "${rows[@]}"; do
    recipe=$configs/distill.yaml
    teacher=$SOURCE
    case $row in
        d2d)
            recipe=$configs/distill_d2d.yaml
            teacher=$DENSE
            unless_there "$OUT/d2d/dense" moe2dense prune-dense "$configs/prune_dense.yaml" source="$DENSE" output="$OUT/d2d/dense" \
                data.path="$tokens"
            distill_row d2d "$OUT/d2d/dense" "$@"
            ;;
        random_ffn)
            convert_row "$CONTROL"
            distill_row "$row" "$OUT/$CONTROL/dense" initialize=random_ffn "$@"
            ;;
        *)
            convert_row "$row"
            distill_row "$row" "$OUT/$row/dense" "$@"
            ;;
    esac
done
