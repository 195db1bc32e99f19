#!/usr/bin/env bash
# torch 2.13.0 under Python 3.13.0, 3.12.1 and 3.11.7: a torch.distributed.checkpoint saved by Python 3.13 can't be read by an older one.
# The writer keeps its folder as a pathlib object, also when checkpoint_id is a string, and pickles it into `.metadata`. Python 3.13 calls
# that class's module pathlib._local, which no older Python has. The other way round works. The tensors' own files are not at fault.
# Seen: saved by 3.13, read by 3.11 or 3.12: FileSystemReader.read_metadata raises ModuleNotFoundError "No module named 'pathlib._local';
# 'pathlib' is not a package"; saved by 3.11, read by 3.13: no error, and load gives [0.0, 1.0, 2.0, 3.0], as saved.
#   PYTHON_NEW=python3.13 PYTHON_OLD=python3.11    the two interpreters; where an index has a CUDA build of torch alone, it is some GB
set -euo pipefail

# first VERSION...: the first interpreter that runs, of those on PATH and of pyenv's.
first() {
    local version candidate
    for version; do
        for candidate in $(type -aP "python$version" || true) "${HOME:-}/.pyenv/versions/$version".*/bin/python; do
            if "$candidate" -c '' 2> /dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
}
new=${PYTHON_NEW:-$(first 3.13)}
old=${PYTHON_OLD:-$(first 3.11 3.12)}
if [[ -z $new || -z $old ]]; then
    echo "not run: takes Python 3.13 (PYTHON_NEW: ${new:-none found}) and 3.11 or 3.12 (PYTHON_OLD: ${old:-none found})" >&2
    exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$new" -m venv "$folder/new"
"$old" -m venv "$folder/old"
"$folder/new/bin/python" -m pip install -q torch==2.13.0
"$folder/old/bin/python" -m pip install -q torch==2.13.0
cat > "$folder/save.py" << 'EOF'
import sys

import torch
import torch.distributed.checkpoint as dcp

dcp.save({"w": torch.arange(4.0)}, checkpoint_id=sys.argv[1])
EOF
cat > "$folder/read.py" << 'EOF'
import sys

import torch
import torch.distributed.checkpoint as dcp

_, path, expected = sys.argv
tensors = {"w": torch.zeros(4)}
try:
    dcp.FileSystemReader(path).read_metadata()
    dcp.load(tensors, checkpoint_id=path)
    outcome = str(tensors["w"].tolist())
except ModuleNotFoundError as error:
    outcome = str(error)
print(f"Python {sys.version.split()[0]} reads {path.split('/')[-1]}: {outcome}")
if expected not in outcome:
    sys.exit(f"the behaviour changed: expected {expected}")
EOF
for side in new old; do "$folder/$side/bin/python" -W ignore "$folder/save.py" "$folder/saved by the $side"; done
"$folder/old/bin/python" -W ignore "$folder/read.py" "$folder/saved by the new" "No module named 'pathlib._local'"
"$folder/new/bin/python" -W ignore "$folder/read.py" "$folder/saved by the old" "[0.0, 1.0, 2.0, 3.0]"
echo "as described"
