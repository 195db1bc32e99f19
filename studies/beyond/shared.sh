#!/usr/bin/env bash
# Part of studies/beyond_pico.sh: a DeepSeek-V2 with a shared expert, trained here; the shared expert's down projection kept or solved as well.
# shellcheck source=studies/beyond/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

dir=$out/shared
mkdir -p "$dir/initial"
cp $configs/shared_experts.json "$dir/initial/config.json"
cp $moe/tokenizer* "$dir/initial/"
unless_trained "$dir/pretrain" $moe2dense distill $configs/pretrain_shared.yaml student="$dir/initial" output="$dir/pretrain"
ended "$dir/pretrain"
unless_there "$dir/moe" $moe2dense export checkpoint="$dir/pretrain" output="$dir/moe"
sample 0
unless_there "$dir/statistics" $moe2dense calibrate source="$dir/moe" output="$dir/statistics" "${text[@]}"

with_shared() { # name, settings of refit
    unless_there "$dir/inits/$1" $moe2dense convert source="$dir/moe" statistics="$dir/statistics" output="$dir/inits/$1" score.method=do_acp \
        "${@:2}"
    distilled "$dir/runs/$1" student="$dir/inits/$1" teacher="$dir/moe" train.steps=300
}

beside with_shared planned
for shared in fixed refitted; do
    for mode in parallel sequential; do beside with_shared $shared-$mode "${text[@]}" refit.shared=$shared refit.mode=$mode; done
    beside with_shared $shared-reconstructed "${text[@]}" refit="{shared: $shared, mode: sequential, reconstruct: $reconstruction}"
done
finish
models="moe: $dir/moe, planned: $dir/inits/planned"
for shared in fixed refitted; do
    for refit in parallel sequential reconstructed; do models+=", $shared-$refit: $dir/inits/$shared-$refit"; done
done
judged "$dir/initial.jsonl" "$models" "$dir/moe"
