# Runs once on every node: checks the hostfile and starts the ranks of this node under the deepspeed launcher.
#   $1 hostfile, $2 port of rank 0, the words that start the launcher, --, module and its arguments
# Which node this is, only the node knows: in the batch shell all would claim to be node 0.
hostfile=$1 port=$2
shift 2
launcher=()
while [ "$1" != -- ]; do launcher+=("$1") && shift; done
shift
listed=$(grep -c "slots=" "$hostfile" 2> /dev/null)
if [ "${listed:-0}" != "$SLURM_STEP_NUM_NODES" ]; then
    # Without its hostfile deepspeed would train on this node alone, once on every node.
    echo "$SLURMD_NODENAME: hostfile $hostfile lists ${listed:-0} nodes here, the step has $SLURM_STEP_NUM_NODES" >&2
    exit 2
fi
address=${MASTER_ADDR:-$(head -n 1 "$hostfile" | cut -d " " -f 1)}
# SIGUSR1 asks to save and stop, SIGTERM to end. Ranks act on both; the launcher would die at once and take them along,
# so it is started deaf to them. Ranks that are still importing miss it: the mark in RLHF_ASKED tells the batch shell,
# which asks once more.
asked() { [ -z "${RLHF_ASKED:-}" ] || touch "$RLHF_ASKED"; }
trap "" USR1 TERM
"${launcher[@]}" --no_ssh --node_rank="$SLURM_NODEID" --hostfile="$hostfile" --master_addr="$address" \
    --master_port="$port" --module "$@" &
trap asked USR1
trap : TERM
while kill -0 $! 2> /dev/null; do wait $!; done
wait $!
