#!/usr/bin/env bash
# What this toolkit does on a GPU, measured and put into one table in under nine minutes, without a network.
#
#   bash benchmarks/gpu.sh pack FOLDER [VERSION]   here, where the package is installed: everything that a bare machine
#                                                  lacks goes into FOLDER, for Python 3.12 or VERSION
#   bash FOLDER/gpu.sh                             there: a machine with a GPU, Python and torch
#   bash FOLDER/gpu.sh training margin             some parts: parity limit training rollouts margin syncs start peaks
#
# Packing reads TOKENIZER (a model's folder), MARGIN_RLHF_DATA (a folder of preference pairs), PYTHON (where the package
# is installed) and HAVE (packages that the machine has, so that they need not travel: HAVE="numpy pyarrow transformers").
# Options that begin with -- are those of python -m benchmarks.gpu. benchmarks/README.md is about all of it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "gpu.sh: $*" >&2; exit 2; }

pack() {
    [ $# -ge 1 ] || fail "pack FOLDER: no folder was named"
    local folder version=${2:-3.12} root tokenizer data
    folder=$(realpath -m "$1")
    root=$(dirname "$here")
    tokenizer=${TOKENIZER:-$root/models/SmolLM2-135M-Instruct}
    data=${MARGIN_RLHF_DATA:-}
    [ -f "$root/constraints.txt" ] || fail "$root: pack from the root of the repository"
    [ -f "$tokenizer/tokenizer.json" ] || fail "TOKENIZER=$tokenizer: there is no tokenizer.json; make quickstart makes one"
    [ -d "$data" ] || fail "MARGIN_RLHF_DATA=$data: name the folder of alpaca_eval_pairs_train.jsonl.gz and hh_harmless_base_test.jsonl.gz"
    mkdir -p "$folder/wheels" "$folder/wheels-ppo" "$folder/tokenizer" "$folder/rows"
    local platforms=() have name python=${PYTHON:-python3}
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${name}_x86_64")
    done
    local fetch=("$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp
        --python-version "$version" "${platforms[@]}")
    read -ra have <<< "${HAVE:-}"
    "$python" - "${have[@]}" > "$folder/wanted.txt" << 'END' || fail "$python: the package is not installed there"
import importlib.metadata as metadata
import sys
from packaging.requirements import Requirement

have = {name.lower().replace("_", "-") for name in sys.argv[1:]} | {"torch", "deepspeed", "margin-rlhf"}
seen, wanted = set(), ["margin-rlhf", "trl"]
while wanted:
    name = wanted.pop().lower().replace("_", "-")
    if name in seen:
        continue
    seen.add(name)
    distribution = metadata.distribution(name)
    if name not in have:
        print(f"{name}=={distribution.version}")
    if name == "torch" or name in have - {"deepspeed", "margin-rlhf"}:
        continue  # the machine's own brings what it needs
    for line in distribution.requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            wanted.append(requirement.name)
END
    "${fetch[@]}" -d "$folder/wheels" -r "$folder/wanted.txt" liger-kernel
    "${fetch[@]}" -d "$folder/wheels-ppo" trl==1.12.0
    "$python" -m pip wheel --quiet --no-deps -w "$folder/wheels" "$(grep '^deepspeed==' "$root/constraints.txt")"
    slim_pot "$python" "$folder"/wheels/pot-*.whl
    cp "$tokenizer"/{tokenizer.json,tokenizer_config.json} "$folder/tokenizer/"
    if [ -f "$tokenizer/chat_template.jinja" ]; then cp "$tokenizer/chat_template.jinja" "$folder/tokenizer/"; fi
    cp "$data"/{alpaca_eval_pairs_train,hh_harmless_base_test}.jsonl.gz "$folder/rows/"
    git -C "$root" archive --format=tar.gz -o "$folder/source.tar.gz" HEAD
    cp "$here/gpu.sh" "$folder/"
    du -sh "$folder"
}

slim_pot() {
    # POT carries a compiled solver of 170 MB that nothing here asks for, and imports it at the start.
    "$1" - "$2" << 'END'
import pathlib
import sys
import zipfile

path = pathlib.Path(sys.argv[1])
slim = path.with_suffix(".part")
stub = "def compute_bspot_bijection(*_, **__):\n    raise NotImplementedError\n\n\nmerge_bijections = compute_bspot_bijection\n"
with zipfile.ZipFile(path) as whole, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as kept:
    for item in whole.infolist():
        if item.filename == "ot/bsp/__init__.py":
            kept.writestr(item.filename, stub)
        elif not (item.filename.startswith("ot/bsp/") and item.filename.endswith(".so")):
            kept.writestr(item, whole.read(item))
slim.replace(path)
END
}

unpack() {
    # Wheels are laid beside each other and found before what the machine has; torch stays the machine's own. dill
    # (datasets) takes modules for library code only where a folder is called site-packages.
    local site=$1.part wheel part job jobs=()
    [ ! -d "$1" ] || return 0
    rm -rf "$site"
    mkdir -p "$site/site-packages" "$site/ppo/site-packages" "$site/source" "$site/bin"
    for wheel in "$here"/wheels/*.whl; do
        python3 -m zipfile -e "$wheel" "$site/site-packages" & jobs+=($!)
    done
    for wheel in "$here"/wheels-ppo/*.whl; do
        python3 -m zipfile -e "$wheel" "$site/ppo/site-packages" & jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    for part in "$site"/site-packages/*.data/{purelib,platlib}; do
        if [ -d "$part" ]; then cp -r "$part"/. "$site/site-packages/"; fi
    done
    for part in "$site"/site-packages/*.data/scripts; do
        if [ -d "$part" ]; then cp "$part"/* "$site/bin/" && chmod +x "$site"/bin/*; fi  # ninja, which builds DeepSpeed's ops
    done
    tar -C "$site/source" -xzf "$here/source.tar.gz"
    mv "$site" "$1"
}

if [ "${1:-}" = pack ]; then shift; pack "$@"; exit; fi

if [ -f "$here/source.tar.gz" ]; then
    command -v python3 > /dev/null || fail "there is no python3"
    python3 -c 'import torch' || fail "python3 has no torch: this machine has to bring one that fits its driver"
    site=${TMPDIR:-/tmp}/margin-rlhf-gpu-$(cksum < "$here/source.tar.gz" | tr ' ' -)
    unpack "$site"
    cd "$site/source"
    export PYTHONPATH="$site/source:$site/site-packages" PATH="$site/bin:$PATH"
    set -- --tokenizer "$here/tokenizer" --rows "alpaca=$here/rows/alpaca_eval_pairs_train.jsonl.gz" \
        --rows "hh=$here/rows/hh_harmless_base_test.jsonl.gz" --prompts launch/quickstart/prompts_train.jsonl \
        --trl-ppo "$site/ppo/site-packages" "$@"
else
    cd "$(dirname "$here")"
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRL_EXPERIMENTAL_SILENCE=1
export POT_BACKEND_DISABLE_JAX=1 POT_BACKEND_DISABLE_CUPY=1 POT_BACKEND_DISABLE_TENSORFLOW=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
