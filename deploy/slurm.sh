#!/bin/bash
# Not run here, where there is no cluster: a fine-tuning on several machines under Slurm. From the checkout:
#   sbatch deploy/slurm.sh configs/finetune.yaml --model MODEL --shards /shared/curated/shards --out /shared/run
# Checkout, environment, shards and out lie on a file system that all machines see; num_machines in
# configs/accelerate/many_nodes.yaml is the number of --nodes below. Before its time is up the job is sent SIGUSR1, saves,
# and is queued again; it goes on from there until it is done (--out has to stand on the command line for that).
#SBATCH --job-name=afresh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
started=$SECONDS
code=0
# Without B: in --signal, Slurm sends it to the steps, and launch.sh in each saves and ends with 0.
srun --kill-on-bad-exit=1 ./launch.sh "$@" --accelerate configs/accelerate/many_nodes.yaml || code=$?
out="$(printf '%s\n' "$@" | grep -A 1 -x -e --out | tail -n 1 || true)"
if ((code == 0)) && [[ -n "$out" && ! -e "$out/summary.json" ]] && ((SECONDS - started > 600)); then
  scontrol requeue "$SLURM_JOB_ID" # stopped in between: summary.json is written last
fi
exit "$code"
