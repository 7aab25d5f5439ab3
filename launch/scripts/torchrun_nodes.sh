#!/usr/bin/env bash
# Train on several machines with torchrun: run this on every one of them, with the same settings.
#   NODES=2 MASTER_ADDR=node1 launch/scripts/torchrun_nodes.sh [key=value ...]
# All machines need this folder, models and data under the same path, and the run folder on a shared file system.
# Name the network between them where there are several: NCCL_SOCKET_IFNAME=eth0, GLOO_SOCKET_IFNAME=eth0 on CPUs.
# Before the first run: rlhf import-gguf smollm2 models/SmolLM2-135M-Instruct
set -euo pipefail
cd "$(dirname "$0")/../.."

NODES=${NODES:-1}
RANKS=${RANKS:-2}                       # ranks of each machine; "gpu" for one on each GPU
MASTER_ADDR=${MASTER_ADDR:-localhost}   # one of the machines, as the others reach it
MASTER_PORT=${MASTER_PORT:-29500}

torchrun --nnodes="$NODES" --nproc-per-node="$RANKS" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id=margin-rlhf \
    -m reward --config launch/recipes/quickstart_reward.yaml "$@"
