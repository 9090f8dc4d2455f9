#!/usr/bin/env bash
# An empty BPF per-CPU hash map without preallocation takes one value for each pair of possible CPUs when it is created.
# The kernel's own account (`memlock`) says 912 bytes.
#
# Seen with bpftool 7.1.0 (Debian 12) on Linux 6.18: 256 maps with values of 16,384 bytes on 2 possible CPUs took 16 MiB
# of per-CPU memory, and 256 plain hashes took none. By the same rule, each such map takes 256 MiB on a machine with 128
# possible CPUs. The map's allocator (kernel/bpf/memalloc.c, prefill_mem_cache) keeps an element ready on each possible
# CPU, and an element is an allocation on all of them.
#
# Needs root, a Linux kernel from 6.1 on, and apt-get. Exits with 0 if the behaviour is as described.
set -euo pipefail
version=7.1.0+6.1.176-1
value=16384

dir=$(mktemp -d)
pins=/sys/fs/bpf/finding-$$
cleanup() { rm -rf "$pins" "$dir"; }
trap cleanup EXIT
cd "$dir"
apt-get -o APT::Sandbox::User=root download "bpftool=$version" > /dev/null
dpkg-deb -x bpftool_*.deb .
bpftool=$dir/usr/sbin/bpftool
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf

per_cpu() { awk '/^Percpu:/ { print $2 }' /proc/meminfo; }
# Prints by how many KiB of per-CPU memory empty maps of a type grow the machine's account.
growth() { # TYPE
  mkdir "$pins"
  local before after
  before=$(per_cpu)
  for n in $(seq "$maps"); do
    "$bpftool" map create "$pins/$n" type "$1" key 4 value "$value" entries 1 name "finding$n" flags 1
  done
  after=$(per_cpu)
  "$bpftool" map show pinned "$pins/1" | sed 's/^/  /' >&2
  rm -r "$pins"
  sleep 2
  echo $((after - before))
}

# Enough maps for 16 MiB: the account counts pages, and a few are always free in part.
cpus=$(($(tr ',-' '\n\n' < /sys/devices/system/cpu/possible | tail -n 1) + 1))
maps=$((16 * 1024 * 1024 / (cpus * cpus * value)))
[ "$maps" -gt 0 ] || maps=1
echo "$("$bpftool" version | head -n 1 | sed 's/.* v/bpftool v/'), Linux $(uname -r), $cpus possible CPUs"
plain=$(growth hash)
each=$(growth percpu_hash)
pairs=$((maps * cpus * cpus * value / 1024))
echo "$maps empty maps of type hash: $plain KiB of per-CPU memory"
echo "$maps empty maps of type percpu_hash: $each KiB; one value for each pair of CPUs is $pairs KiB"
if [ "$each" -lt $((pairs * 7 / 10)) ] || [ "$plain" -gt $((pairs / 10)) ]; then
  echo "the behaviour has changed" >&2
  exit 1
fi
echo "as described"
