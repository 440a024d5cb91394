#!/usr/bin/env bash
# A run on two machines of eight GPUs under SLURM that outlives its time limit and preemption:
#   sbatch configs/slurm.sh configs/qwen2.5-7b-pku-saferlhf.yaml [--section.setting VALUE ...]
#
# UNTESTED under SLURM: none was at hand. Tested are its parts, with processes started by hand: SIGTERM to all of them
# leaves a checkpoint and exit code 143, and `--ckpt_path last-if-any` goes on to the same end (tests/distributed).
#
# Needed: a folder that all machines see (run it from there), and one task for each GPU.
#SBATCH --job-name=nspo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# SIGTERM to every task (no `B:`) this long before the end: more than one training step, one validation, or a calibration
# takes. Where jobs are preempted, the partition's GraceTime must be as long.
#SBATCH --signal=TERM@600

set -u
config=${1:?usage: sbatch configs/slurm.sh CONFIG [options]}
shift

# Any task that fails ends the others. `last-if-any` begins where there is no checkpoint yet.
srun --kill-on-bad-exit=1 python -m nspo_lightning fit \
  -c "$config" -c strategies/ddp -c strategies/slurm \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --ckpt_path last-if-any "$@"
code=$?

if [ "$code" -eq 143 ]; then   # 128 + SIGTERM: stopped with a checkpoint, not done
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
