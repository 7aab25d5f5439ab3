#!/usr/bin/env bash
# Train on several machines over ssh: a supervisor on every host of the hostfile starts the ranks of that host.
#   launch/scripts/ssh_hostfile.sh [key=value ...]
# The hostfile has a line "HOST slots=DEVICES" for each machine; rank 0 runs on the first one. All machines need
#   this folder and the Python environment under the same path (a shared file system),
#   ssh from here without a password (try: ssh HOST true).
# PATH, PYTHON*, HF_*, WANDB_*, OMP_*, NCCL_*, GLOO_* and their like pass, and what a file .deepspeed_env here says, one
# NAME=VALUE a line; none of it is on a command line. The first host is asked where the others reach it, unless
# MASTER_ADDR says so. Ctrl-C ends all ranks, SIGTERM lets them save.
# Before the first run: rlhf import-gguf smollm2 models/SmolLM2-135M-Instruct
set -euo pipefail
cd "$(dirname "$0")/../.."

HOSTFILE=${HOSTFILE:-hostfile}
export MASTER_PORT=${MASTER_PORT:-29500}

# Every host must answer, or nothing is started.
python -m launch.jobs.hostfile "$HOSTFILE"

exec python -m launch.jobs.over_ssh "$HOSTFILE" -- \
    python -m reward --config launch/recipes/quickstart_reward.yaml "$@"
