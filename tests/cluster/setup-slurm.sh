#!/usr/bin/env bash
# A real Slurm on this machine, for the tests: two nodes of eight fake H200s and, in a partition of their own, three
# without, one of which a test loses; no accounting database. Any user of the machine may submit. For bare Debian 12, as root. May be run again, even after a restart of the machine: what runs is stopped first.
#
#   tests/cluster/setup-slurm.sh          install, configure, start, and wait until both nodes are idle
#   tests/cluster/setup-slurm.sh stop     stop what it started
set -euo pipefail

nodes=(n1 n2 n3 n4 n5)
host=$(hostname -s)
conf=/etc/slurm/slurm.conf

stop_by() { # stop the process that a pid file names, if it is the program that is meant
    local pid
    [[ -r $1 ]] || return 0
    pid=$(< "$1")
    [[ $pid =~ ^[0-9]+$ && -r /proc/$pid/comm && $(< "/proc/$pid/comm") == "$2"* ]] || return 0
    kill "$pid"
    for _ in {1..100}; do
        [[ -e /proc/$pid ]] || return 0
        sleep 0.1
    done
    kill -KILL "$pid"
}

stop() {
    for node in "${nodes[@]}"; do
        stop_by "/run/slurm/slurmd-$node.pid" slurmd
    done
    stop_by /run/slurm/slurmctld.pid slurmctld
    stop_by /run/munge/munged.pid munged
}

if [[ ${1:-} == stop ]]; then
    stop
    exit
fi

if ! command -v slurmctld > /dev/null || ! command -v munged > /dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    # Nothing may start by itself: the daemons are configured below.
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod 755 "$policy"
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null
fi

stop

# munge: proves who sends a request
mkdir -p /etc/munge /run/munge /var/log/munge /var/lib/munge
[[ -s /etc/munge/munge.key ]] || head -c 1024 /dev/urandom > /etc/munge/munge.key
chown -R munge:munge /etc/munge /run/munge /var/log/munge /var/lib/munge
chmod 700 /etc/munge
chmod 400 /etc/munge/munge.key
chmod 755 /run/munge
rm -f /run/munge/munge.socket*
setpriv --reuid munge --regid munge --clear-groups munged

# All nodes are this machine.
for node in "${nodes[@]}"; do
    grep -qE "[[:space:]]$node\$" /etc/hosts || printf '127.0.0.1\t%s\n' "$node" >> /etc/hosts
    mkdir -p "/var/spool/slurmd/$node"
done
for index in {0..7}; do
    [[ -e /dev/fakegpu$index ]] || mknod "/dev/fakegpu$index" c 1 3
    chmod 666 "/dev/fakegpu$index"
done
mkdir -p /etc/slurm /run/slurm /var/log/slurm /var/spool/slurmctld
# Jobs from an earlier start must not come back.
find /var/spool/slurmctld -mindepth 1 -delete

cat > /etc/slurm/gres.conf << END
NodeName=n[1-2] Name=gpu Type=h200 File=/dev/fakegpu[0-7]
END
cat > "$conf" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
StateSaveLocation=/var/spool/slurmctld
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdSpoolDir=/var/spool/slurmd/%n
SlurmdPidFile=/run/slurm/slurmd-%n.pid
SlurmdLogFile=/var/log/slurm/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,default_queue_depth=100
GresTypes=gpu
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=30
MessageTimeout=60
MinJobAge=7200
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=128 Boards=1 SocketsPerBoard=1 CoresPerSocket=128 ThreadsPerCore=1 RealMemory=400000 Gres=gpu:h200:8
NodeName=n[3-5] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17003-17005] CPUs=128 Boards=1 SocketsPerBoard=1 CoresPerSocket=128 ThreadsPerCore=1 RealMemory=400000
PartitionName=spare Nodes=n[3-5] MaxTime=1-00:00:00 DefaultTime=10 State=UP
PartitionName=gpu Nodes=n[1-2] Default=YES MaxTime=1-00:00:00 DefaultTime=10 State=UP
END

slurmctld
for node in "${nodes[@]}"; do
    slurmd -N "$node"
done
for _ in {1..300}; do
    idle=$(sinfo --noheader --Node --format=%T 2> /dev/null | grep -cx idle || true)
    if ((idle == ${#nodes[@]})); then
        echo "slurm: $(sinfo --version), ${#nodes[@]} nodes idle"
        exit
    fi
    sleep 0.2
done
echo "slurm: the nodes did not become idle:" >&2
sinfo --Node --long >&2 || true
tail -n 20 /var/log/slurm/*.log >&2
exit 1
