#!/usr/bin/env bash
# Template: one vfl run over several machines with torchrun. Start it on every node, with the same values:
#   NODES=2 HEAD=node0.example.org scripts/torchrun_nodes.sh fedavg --data cifar10 --out /shared/runs/first
# The folder --out must be on a file system that all nodes share; a restarted run finds its checkpoints there.
set -euo pipefail
: "${NODES:?how many machines}" "${HEAD:?name or address of one of them, reachable by all}"
# One process a GPU; without GPUs, one a core, each with one thread.
ranks="${RANKS_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
if [ "$ranks" -eq 0 ]; then
    ranks="$(nproc)"
    export OMP_NUM_THREADS=1
fi
exec torchrun --nnodes "$NODES" --nproc_per_node "$ranks" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${ID:-vfl}" \
    -m vfl run "$@"
