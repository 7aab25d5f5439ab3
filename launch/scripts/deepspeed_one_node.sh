#!/usr/bin/env bash
# Train on this machine: one rank for each GPU, or RANKS processes where there are none.
#   launch/scripts/deepspeed_one_node.sh [key=value ...]
# Before the first run: rlhf import-gguf smollm2 models/SmolLM2-135M-Instruct
set -euo pipefail
cd "$(dirname "$0")/../.."

RANKS=${RANKS:-2}                   # ranks of this machine
MASTER_PORT=${MASTER_PORT:-29500}   # a second run on this machine needs another

deepspeed --num_accelerators "$RANKS" --master_port "$MASTER_PORT" \
    --module reward --config launch/recipes/quickstart_reward.yaml "$@"
