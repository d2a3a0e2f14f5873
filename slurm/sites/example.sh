# shellcheck shell=bash
# What a site needs. Copy it, change what differs, leave out the rest: cp slurm/sites/example.sh slurm/site.sh
# slurm/*.sh and make source slurm/site.sh, in bash, on login and compute nodes; NANOGPT_SITE names another file.
# ${NAME:-VALUE} lets a variable that is set already win: NANOGPT_RUNS=/elsewhere slurm/run.sh ...

# Apptainer, where it comes as a module. For `make sif` also a Python of 3.11 or newer, if the system's is older.
# module load apptainer miniforge

# How jobs are submitted: any SBATCH_* variable of sbatch's. `sinfo -s` lists partitions, `sacctmgr show assoc user=$USER`
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

# A disk of the node's own, to which image and shards are copied first, where the shared file system is slow.
# export NANOGPT_STAGE=${NANOGPT_STAGE:-/tmp}

# Further directories to show in the image, for what links and recipes lead to.
# export APPTAINER_BIND=${APPTAINER_BIND:-/archive}

# The way to the internet from compute nodes.
# export HTTPS_PROXY=${HTTPS_PROXY:-http://proxy:3128}

# The network between nodes, where NCCL does not find it by itself.
# export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0}
