#!/usr/bin/env bash
# Train inside a SLURM allocation without any other launcher: SLURM itself starts one task for each rank.
#   salloc --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/scripts/srun.sh [key=value ...]
# Before the first run: rlhf import-gguf smollm2 models/SmolLM2-135M-Instruct
set -euo pipefail
cd "$(dirname "$0")/../.."

# Where the ranks meet: on the first node of the allocation, as SLURM reaches it.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Every rank sees all GPUs of its node and takes that of its own number.
srun --gpu-bind=none --kill-on-bad-exit=1 \
    python -m reward --config launch/recipes/quickstart_reward.yaml "$@"
