# shellcheck shell=bash
# What a site needs. Copy it, change what differs, and leave out the rest: cp slurm/sites/example.sh slurm/site.sh
# slurm/*.sh and make source slurm/site.sh, in bash, on login and compute nodes; NANOGPT_SITE names another file.
# ${NAME:-VALUE} keeps a variable that is already set: NANOGPT_RUNS=/elsewhere slurm/run.sh ...

# Apptainer, if it comes as a module; for `make sif` also Python 3.11 or newer, if the system's is older.
# module load apptainer miniforge

# How jobs are submitted: any of sbatch's SBATCH_* variables. `sinfo -s` lists partitions, `sacctmgr show assoc user=$USER`
# accounts. They hold for `slurm/run.sh RECIPE`; before `sbatch slurm/run.sh RECIPE`, type: . slurm/site.sh
# export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-mylab}

# CPUs that a job asks for with each GPU; 8 unless said. What a node has for each: sinfo -o '%P %G %c'
# export NANOGPT_CPUS_PER_GPU=${NANOGPT_CPUS_PER_GPU:-15}

# Image, shards, runs and compiled code, on a file system that all nodes see and that has room: 3, 2, 2 (a checkpoint)
# and 1 GB. Without these: nanogpt.sif, data/fineweb10B, runs and runs/cache, where a command is typed.
# export NANOGPT_SIF=${NANOGPT_SIF:-$SCRATCH/nanogpt.sif}
# export NANOGPT_DATA=${NANOGPT_DATA:-$SCRATCH/fineweb10B}
# export NANOGPT_RUNS=${NANOGPT_RUNS:-$SCRATCH/runs}
# export NANOGPT_CACHE=${NANOGPT_CACHE:-$SCRATCH/cache}

# The node's own disk, to copy image and shards to first if the shared file system is slow.
# export NANOGPT_STAGE=${NANOGPT_STAGE:-/tmp}

# Further directories to bind into the image, for what links and recipes lead to.
# export APPTAINER_BIND=${APPTAINER_BIND:-/archive}

# How compute nodes reach the internet.
# export HTTPS_PROXY=${HTTPS_PROXY:-http://proxy:3128}

# The network between nodes, if NCCL does not find it by itself.
# export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0}
