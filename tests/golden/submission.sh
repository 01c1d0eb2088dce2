#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=cryosplat-mine
#SBATCH --mem=204800M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=PLACE/runs/mine/jobs/dry-run/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=1590

# setup
export NCCL_DEBUG=WARN
cd PLACE/runs/mine/jobs/dry-run/code || exit 1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output PLACE/runs/mine/jobs/dry-run/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=8 PYTHON -u -m submitit.core._submit PLACE/runs/mine/jobs/dry-run

