#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one process on each. From the top of the repository, with .venv made and a directory
# that all nodes share:
#
#     sbatch --nodes 4 launch/slurm.sh configs/flux2_sft.py --model /shared/klein --out /shared/runs/klein
#
# The processes find each other through SLURM. A job that is preempted or comes to its time limit is asked to save two
# minutes before; a requeued one resumes from the newest checkpoint.
#SBATCH --job-name=clvr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}} # of each node

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch [--nodes N] launch/slurm.sh CONFIG --out DIR [OPTION ...]" >&2
  exit 2
fi

# JAX gives a process under SLURM one GPU, the one of its number on the node, unless one is named.
JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((GPUS - 1)))
export JAX_LOCAL_DEVICE_IDS
srun --kill-on-bad-exit=1 "$PYTHON" launch/train.py "$@" --resume
