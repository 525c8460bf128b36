"""The configuration of the cluster that cluster.py starts, and what the first process of a node does. Times in seconds."""

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has gone: 121 s by default
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=4
KillWait={kill_wait_s}
OverTimeLimit=0
MinJobAge=300
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={nodes} NodeAddr={addresses} CPUs={cpus} RealMemory=8000 {gres} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

# this version's slurmd does not start with another plugin in a namespace
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"

# PID 1 of a node's namespace: it reaps orphans, and who kills it takes the node's power away
NODE_INIT = """\
set -e
hostname {node}
mount -t proc proc /proc
mount --bind {root}/hosts /etc/hosts
mount --bind {root}/resolv.conf /etc/resolv.conf
mount -t tmpfs tmpfs /dev/shm
mkdir -p {root}/spool/{node}
export SLURM_CONF={root}/slurm.conf PATH=/usr/sbin:/usr/bin:/sbin:/bin
slurmd -D >>{root}/log/slurmd.{node}.out 2>&1 &
while :; do sleep 3600 & wait $!; done
"""
