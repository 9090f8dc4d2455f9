#!/bin/sh
# The first and only process of the guest of `cargo xtask test vm`: makes it a machine, runs the tests, says how they ended.
export PATH=/usr/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
modprobe br_netfilter
modprobe veth
modprobe tun
cat /proc/sys/kernel/osrelease
# Load keeps many sockets open where everything takes its time.
ulimit -n 65536
status=0
for tier in $(cat /tiers); do
    # In the program tier each test has maps and interfaces of its own; what they print is the verifier's table. The lab's
    # tests have time limits.
    case $tier in
        program) how="--test-threads 2 --show-output" ;;
        *) how="--test-threads 1" ;;
    esac
    echo "tier $tier"
    /breaker/tests/$tier $how $(cat /filter) || status=$?
done
# xtask's MARKER.
echo "breaker-vm: exit $status"
# Power off, without waiting for anybody. It takes a moment, and the kernel panics when its first process ends.
echo o > /proc/sysrq-trigger
exec sleep 60
