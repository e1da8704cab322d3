#!/bin/bash
# senet train on SLURM: `sbatch deploy/slurm.sh --model se_resnet50 --data shards:/shared/imagenet …`
# Change the lines of #SBATCH to the cluster; OUT is one folder that all nodes see.
#SBATCH --job-name=senet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
# SIGTERM two minutes before the time limit (and at a preemption): torchrun hands it on, every rank
# stops after its step, rank 0 writes a checkpoint. torchrun waits 30 s for that.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=senet-%j.out

set -u
OUT="${OUT:-$PWD/runs/$SLURM_JOB_ID}"
RESTARTS="${RESTARTS:-20}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
mkdir -p "$OUT.logs"

# A killed rank ends torchrun with 1; the job is requeued and --resume auto goes on at the checkpoint.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${GPUS_PER_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$MASTER_ADDR:29500" \
    --max-restarts=0 \
    --log-dir="$OUT.logs" --redirects=3 --tee=3 \
    -m senet train --resume auto --out "$OUT" --timeout 600 --checkpoint-steps 500 "$@"
code=$?

if [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
    echo "senet ended with exit code $code: requeued to go on"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
