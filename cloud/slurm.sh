#!/bin/bash
# A worker of a sweep in each job of an array:  sbatch --array=0-7 --partition=gpu cloud/slurm.sh EXPERIMENT.py RUN [OPTIONS]
# A job whose time is up, or that is preempted, saves, ends with status 75, and goes back into the queue.
#SBATCH --job-name=llm-jax
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
trap : TERM # this shell waits for its step, which has the signal too
experiment=$1 run=$2
shift 2
srun llm-jax sweep "$experiment" --run "$run" "$@"
status=$?
if [ "$status" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" # of this task alone: each job of an array has an id of its own
fi
exit "$status"
