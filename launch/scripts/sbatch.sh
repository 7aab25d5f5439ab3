#!/usr/bin/env bash
# A batch job without any other launcher, to read and edit. "rlhf slurm render" writes a longer one, which also checks
# the nodes, tells a lost node from a crash, and runs a snapshot of the code.
#   sbatch launch/scripts/sbatch.sh [key=value ...]      (from this repository)
# Before the first run: rlhf import-gguf smollm2 models/SmolLM2-135M-Instruct
#SBATCH --job-name=reward
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# On GPUs, one task for each of them (a line counts without the first two characters):
# #SBATCH --gpus-per-node=8
# #SBATCH --ntasks-per-node=8
# #SBATCH --partition=gpu
set -uo pipefail

# source .venv/bin/activate
# export NCCL_SOCKET_IFNAME=ib0      # the network between the nodes; GLOO_SOCKET_IFNAME on CPUs

# Where the ranks meet: on the first node of the job, as SLURM reaches it.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# SLURM sends SIGUSR1 to this shell before the time limit, which hands it to the ranks: they save, and exit with 75.
asked=no
trap 'asked=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# Before Python has started, the signal would kill the ranks, so it is ignored until they listen. --kill-on-bad-exit
# would end ranks that still save.
srun --kill-on-bad-exit=0 --wait=60 bash -c 'trap "" USR1 && exec "$@"' rank \
    python -m reward --config launch/recipes/quickstart_reward.yaml "$@" &
while kill -0 $! 2> /dev/null; do wait $!; done     # the signal ends a wait, not srun
wait $!
code=$?

# A STOP file or train.max_minutes end the run with 75 as well, and then the job.
if [ "$code" = 75 ] && [ "$asked" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0      # goes on from the newest checkpoint
fi
exit "$code"
