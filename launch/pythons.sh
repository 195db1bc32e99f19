#!/usr/bin/env bash
# The README's two commands under every Python 3.11 to 3.13 found here: for each a clean clone of HEAD, set-up, quickstart, and the tests of
# checkpoints, resuming and the command line; then a run that each begins is continued and exported by every other. Prints the
# table of docs/operations.md. On 3.12 and 3.13 the index has a CUDA build of torch alone, of some GB.
#   PYTHONS="/usr/bin/python3.11 ..."     these instead of those found
#   PARTS="quickstart tests exchange own" what to do; own: runs are continued under the interpreter that began them, too
#   WITH=.                                a checkout with a .venv of its own that takes part in the exchange
#   OUT=out/pythons                       clones and logs
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
OUT=$(realpath -m "${OUT:-out/pythons}")
PARTS=" ${PARTS:-quickstart tests exchange own} "
TESTS="tests/trainer/test_checkpoint_pickles.py tests/trainer/test_checkpoints.py tests/trainer/test_resume.py tests/common/test_cli.py"

full() { "$1" -c 'import platform; print(platform.python_version())' 2> /dev/null; }

# One interpreter of each version, those on PATH first.
found() {
    local candidate version seen=" "
    for candidate in $(type -aP python3.11 python3.12 python3.13) "${HOME:-}"/.pyenv/versions/3.1[123].*/bin/python3; do
        version=$(full "$candidate") || continue
        [[ $seen != *" $version "* ]] || continue
        seen+="$version "
        echo "$candidate"
    done
}

# timed NAME COMMAND...: its output goes to the log of this interpreter; sets result to "ok, seconds" or "FAILED".
timed() {
    local begun=$SECONDS
    printf '%s: %s ... ' "$version" "$1" >&2
    shift
    if "$@" >> "$OUT/$version.txt" 2>&1; then result="$((SECONDS - begun)) s"; else result="FAILED" failed=1; fi
    echo "$result" >&2
}

mkdir -p "$OUT"
failed=0 rows="" clones=()
[[ -z ${WITH:-} ]] || clones+=("$(realpath "$WITH")")
for python in ${PYTHONS:-$(found)}; do
    version=$(full "$python")
    clone=$OUT/$version
    rm -rf "$clone" "$OUT/$version.txt"
    git clone -q "$root" "$clone"
    cd "$clone"
    timed set-up make PYTHON="$python" .venv/.installed-dev
    row="| $version | $(.venv/bin/python -W ignore -c '
import importlib.metadata as installed
print(*(installed.version(name) for name in ("torch", "megatron-core", "transformers")), sep=" | ")') | $result"
    quality="-"
    if [[ $PARTS == *" quickstart "* ]]; then
        timed quickstart make quickstart
        quality=$(awk '$1 == "distilled" {print $5}' "$OUT/$version.txt")
    else result=-; fi
    row+=" | $result | ${quality:--}"
    if [[ $PARTS == *" tests "* ]]; then
        # shellcheck disable=SC2086
        timed tests env OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile $TESTS
    else result=-; fi
    rows+="$row | $result |"$'\n'
    clones+=("$clone")
    cd "$root"
done

exchanged=""
if [[ $PARTS == *" exchange "* ]]; then
    for writer in "${clones[@]}"; do
        cd "$writer"
        from=$(full .venv/bin/python) version=$from
        timed "begin a run" .venv/bin/python -W ignore -m tests.trainer.exchange begin out/exchange
        for reader in "${clones[@]}"; do
            [[ $reader != "$writer" || $PARTS == *" own "* ]] || continue
            cd "$reader"
            version=$(full .venv/bin/python)
            timed "go on from $from" .venv/bin/python -W ignore -m tests.trainer.exchange go_on "$writer/out/exchange"
            exchanged+="| $from | $version | ${result/#FAILED/**failed**} |"$'\n'
        done
    done
fi

printf '| Python | torch | megatron-core | transformers | set-up | quickstart | KL of its student | tests |\n|---|---|---|---|---|---|---|---|\n%s' "$rows"
[[ -z $exchanged ]] || printf '\n| begun under | resumed and exported under | |\n|---|---|---|\n%s' "$exchanged"
exit $failed
