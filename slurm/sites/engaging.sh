# shellcheck shell=bash
# MIT's Engaging: cp slurm/sites/engaging.sh slurm/site.sh. What is behind it, and where to look it up: docs/engaging.md.
# What is set already wins: SBATCH_PARTITION=mit_preemptable slurm/run.sh ...
module load apptainer/1.4.2

export SBATCH_PARTITION=${SBATCH_PARTITION:-mit_normal_gpu} # 6 hours, two GPUs a user
export NANOGPT_CPUS_PER_GPU=${NANOGPT_CPUS_PER_GPU:-8}      # 15 are the most

# Home has 200 GB, this 1 TB; both are seen from all nodes.
scratch=$HOME/orcd/scratch/nanogpt
mkdir -p "$scratch"
export NANOGPT_SIF=${NANOGPT_SIF:-$scratch/nanogpt.sif}
export NANOGPT_DATA=${NANOGPT_DATA:-$scratch/fineweb10B}
export NANOGPT_RUNS=${NANOGPT_RUNS:-$scratch/runs}
export NANOGPT_CACHE=${NANOGPT_CACHE:-$scratch/cache}
