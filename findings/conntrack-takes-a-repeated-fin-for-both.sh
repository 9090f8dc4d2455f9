#!/usr/bin/env bash
# Linux's connection tracking calls a TCP connection TIME_WAIT, with two minutes to live, when one side's FIN was sent twice,
# although the other side has not ended and may still send data. Sent once, the FIN leaves it in CLOSE_WAIT.
#
# Seen with conntrack 1.4.7 and iptables 1.8.9 (Debian 12) on Linux 6.18. A client closes its own direction (shutdown) and
# waits for the rest of an answer, as a request over a half-closed connection does. An acknowledgment that is lost, or late
# because the server is stopped, makes the client's kernel repeat its FIN. The table of states
# (net/netfilter/nf_conntrack_proto_tcp.c, tcp_conntracks) goes from FIN_WAIT to LAST_ACK by a second FIN of either side.
# Whoever lists the connections of a Service by state misses this one, and an address translation forgets it after
# nf_conntrack_tcp_timeout_time_wait (120 s).
#
# Needs root, a Linux kernel with nf_conntrack, iproute2, Python 3 and apt-get. Exits with 0 if the behaviour is as described.
set -euo pipefail

dir=$(mktemp -d)
ns=finding-$$
cleanup() {
  ip netns pids "$ns" 2> /dev/null | xargs -r kill 2> /dev/null || true
  ip netns del "$ns" 2> /dev/null || true
  rm -rf "$dir"
}
trap cleanup EXIT
cd "$dir"
for package in conntrack=1:1.4.7-1+b2 iptables=1.8.9-2; do
  apt-get -o APT::Sandbox::User=root download "$package" > /dev/null
done
for file in *.deb; do dpkg-deb -x "$file" .; done
in_ns() { ip netns exec "$ns" "$@"; }
iptables() { in_ns env XTABLES_LIBDIR="$(echo "$dir"/usr/lib/*/xtables)" "$dir/usr/sbin/iptables-legacy" "$@"; }
conntrack=$dir/usr/sbin/conntrack

ip netns add "$ns"
ip -n "$ns" link set lo up
# A rule that needs the state switches the tracking on.
iptables -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT
echo "$("$conntrack" --version), Linux $(uname -r)"

cat > half.py << 'PY'
import socket, subprocess, sys, time

port = int(sys.argv[1])
server = socket.create_server(("127.0.0.1", port))
client = socket.create_connection(("127.0.0.1", port))
served, _ = server.accept()
client.sendall(b"request")
served.recv(64)
print("connected", flush=True)
sys.stdin.readline()
client.shutdown(socket.SHUT_WR)
print("ended", flush=True)
sys.stdin.readline()
# The connection still works in the other direction.
served.sendall(b"answer")
print(client.recv(64).decode(), flush=True)
sys.stdin.readline()
PY

# Prints the state in which the tracking has the connection after the client's FIN.
state_after() { # PORT LOST?
  coproc half { in_ns python3 half.py "$1"; }
  local line
  read -r line <&"${half[0]}"
  # The acknowledgments of the server are lost, for as long as it takes to send the FIN again.
  [ "$2" = no ] || iptables -I OUTPUT -p tcp --sport "$1" -j DROP
  echo >&"${half[1]}"
  read -r line <&"${half[0]}"
  sleep 1
  [ "$2" = no ] || iptables -D OUTPUT -p tcp --sport "$1" -j DROP
  sleep 1.5
  state=$(in_ns "$conntrack" -L -p tcp --dport "$1" 2> /dev/null | awk '{ print $4, $3 }')
  echo >&"${half[1]}"
  read -r answer <&"${half[0]}"
  echo >&"${half[1]}"
  wait "$half_PID" || true
  state=${state% *}
}

state_after 4001 no
echo "FIN sent once: $state; then the server sent: $answer"
once=$state
state_after 4002 yes
echo "FIN sent again: $state; then the server sent: $answer"
if [ "$once" != CLOSE_WAIT ] || [ "$state" != TIME_WAIT ] || [ "$answer" != answer ]; then
  echo "the behaviour has changed" >&2
  exit 1
fi
echo "as described"
