#!/usr/bin/env bash
# Train on this machine with torchrun instead of the deepspeed launcher.
#   launch/scripts/torchrun_one_node.sh [key=value ...]
# Before the first run: rlhf import-gguf smollm2 models/SmolLM2-135M-Instruct
set -euo pipefail
cd "$(dirname "$0")/../.."

RANKS=${RANKS:-2}   # ranks of this machine; "gpu" for one on each GPU

torchrun --standalone --nproc-per-node="$RANKS" \
    -m reward --config launch/recipes/quickstart_reward.yaml "$@"
