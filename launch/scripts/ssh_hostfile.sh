#!/usr/bin/env bash
# Train on several machines over ssh: the deepspeed launcher starts the ranks of every host in the hostfile with pdsh.
#   launch/scripts/deepspeed_hostfile.sh [key=value ...]
# The hostfile has a line "HOST slots=DEVICES" for each machine; rank 0 runs on the first one. All machines need
#   this folder and the Python environment under the same path (a shared file system),
#   ssh from here without a password (try: ssh HOST true), and pdsh on this machine.
# Environment variables reach the other machines through a file .deepspeed_env here, one NAME=VALUE a line:
# GLOO_SOCKET_IFNAME=eth0 (NCCL_SOCKET_IFNAME for GPUs), OMP_NUM_THREADS=8 and so on.
# Before the first run: rlhf import-gguf smollm2 models/SmolLM2-135M-Instruct
set -euo pipefail
cd "$(dirname "$0")/../.."

HOSTFILE=${HOSTFILE:-hostfile}
MASTER_PORT=${MASTER_PORT:-29500}

# deepspeed takes a missing hostfile for "this machine alone", and waits for machines that do not answer.
python -m launch.jobs.hostfile "$HOSTFILE"

# Where the first host is to be reached by the others: its name, unless MASTER_ADDR says something else.
MASTER_ADDR=${MASTER_ADDR:-$(awk '!/^#/ && NF { print $1; exit }' "$HOSTFILE")}

deepspeed --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
    --module reward --config launch/recipes/quickstart_reward.yaml "$@"
