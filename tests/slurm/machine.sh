#!/usr/bin/env bash
# First process of one machine of the test cluster, inside its own namespaces: machine.sh LAB_FOLDER NAME
set -euo pipefail
lab=$1 name=$2 run=$1/run

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$run"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t sysfs sysfs /sys # the network devices of this machine alone
mount --bind "$lab/etc/hosts" /etc/hosts
hostname "$name"
ip link set lo up
touch "$lab/sync/$name.born"
for ((i = 0; i < 1000; i++)); do
  [ -e "$lab/sync/$name.wired" ] && break
  sleep 0.01
done

umask 022
mkdir -m 755 "$run/munge" "$run/dev"
munged --key-file="$lab/etc/munge.key" --socket="$run/munge/munge.socket" --pid-file="$run/munge/munged.pid" \
  --log-file="$run/munge/munged.log" --seed-file="$run/munge/munged.seed" --num-threads=2
for i in 0 1 2 3; do mknod -m 666 "$run/dev/gpu$i" c 1 3; done # files that stand for GPUs
if [ "$name" = ctl ]; then daemon=(slurmctld -D); else daemon=(slurmd -D -N "$name"); fi
status=0
trap : TERM INT HUP
while :; do
  if [ ! -e "$run/daemon.pid" ] && [ ! -e "$run/daemon.stop" ]; then
    "${daemon[@]}" &
    echo $! >"$run/daemon.pid"
  fi
  wait -n || status=$? # reap orphans; a machine outlives its daemon
  [ "$status" = 127 ] && sleep 0.2
  status=0
done
