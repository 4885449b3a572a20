#!/bin/sh
# Prove a vDPA device with a Linux guest: traffic both ways, other drivers, live switches.
#
#   tools/vdpa-proof.sh DEVICE PEER/PREFIX GUEST/PREFIX
#
# DEVICE as for --net vhost-vdpa,device=. PEER is a host that is reachable through the device; it
# answers pings and runs `iperf3 -s`. GUEST is a free address in its network. Runs on this machine,
# as root. Each step says how long it may take ($SLOW times as long on a slow machine; default 1)
# and how long it took. The last line says PASS or FAIL.
set -eu
if [ $# -ne 3 ]; then
	sed -n 's/^# \{0,1\}//; 2,10p' "$0" >&2
	exit 2
fi
device=$1 peer=${2%/*} guest=$3
slow=${SLOW:-1}
pyvmm=$(dirname "$0")/../.venv/bin/pyvmm
name=vdpa-proof-$$
report=$(mktemp)
failed=0

# step SECONDS WHAT COMMAND...
step() {
	most=$(($1 * slow)) what=$2 status=0
	shift 2
	begin=$(date +%s)
	echo "== $what (at most $most s)"
	timeout --foreground -k 10 "$most" "$@" </dev/null || status=$?
	[ $status -ne 124 ] || echo "-- $what has not ended in $most s"
	[ $status -eq 0 ] || failed=1
	echo "-- status $status after $(($(date +%s) - begin)) s"
	return 0
}
running=
clean() {
	[ -z "$running" ] || timeout -k 5 $((20 * slow)) "$pyvmm" quit --host local "$name" || true
	rm -f "$report"
}
trap clean EXIT
trap 'exit 130' INT TERM

# The guest's part: $1 is the peer, $2 the guest's address, $3 how slow the machine is.
part='
set -eu
say() { echo "== guest: $*"; }
within() {
	most=$(($1 * slow)); shift
	timeout "$most" "$@" || { echo "-- failed, or not done in $most s: $*"; exit 1; }
}
peer=$1 slow=$3
up() {
	ip addr show dev eth0 | grep -q "inet ${2%/*}/" || ip addr add "$2" dev eth0
	ip link set eth0 up
}
# The server is not back at once from the test before.
tcp() {
	set -- -c "$peer" --connect-timeout $((5000 * slow)) -t 5 "$@"
	within 30 sh -c "until iperf3 $* >/tmp/iperf 2>&1; do tail -n 1 /tmp/iperf; sleep 1; done"
	tail -n 4 /tmp/iperf
}
say ping; up "$@"; within 20 ping -q -c 20 -i 0.1 "$1"
say TCP to the peer; tcp
say TCP from the peer; tcp -R
say UDP; tcp -u -b 20M -l 400
say driver; for i in 1 2 3; do
	within 20 rmmod virtio_net; within 20 modprobe virtio_net; up "$@"
	within 20 ping -q -c 5 -i 0.1 "$1" >/tmp/ping; grep received /tmp/ping
done
say queue pairs; ethtool -l eth0 | grep Combined
'

step 30 "what this machine has" sh -c "'$pyvmm' doctor | grep -E '^(vdpa|vduse|kvm) ' || true"
step 150 "a guest on $device" "$pyvmm" run --host local --report "$report" \
	--net "vhost-vdpa,device=$device,guest=$guest" -- sh -c "$part" sh "$peer" "$guest" "$slow"
grep -o '"tx_possible_repeats": [0-9]*' "$report" | sort -u || true

if grep -q '"suspend": true' "$report"; then
	step 60 "a guest for live switches" "$pyvmm" run --host local --detach=/dev/null --name "$name" \
		--net "vhost-vdpa,device=$device,guest=$guest,switchable=emulated" -- sleep 600
	running=1
	for i in 1 2 3 4 5 6 7 8 9 10; do
		step 20 "switch $i away from the device" "$pyvmm" switch --host local "$name" emulated
		step 20 "switch $i back" "$pyvmm" switch --host local "$name" vhost-vdpa
	done
else
	echo "== no live switches: the device cannot be suspended"
fi
[ $failed = 0 ] && echo PASS || echo FAIL
exit $failed
