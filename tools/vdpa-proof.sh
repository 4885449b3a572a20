#!/bin/sh
# Prove a vDPA device with a Linux guest: traffic both ways, other drivers, a reboot, live switches.
#
#   tools/vdpa-proof.sh DEVICE PEER/PREFIX GUEST/PREFIX
#
# DEVICE as for --net vhost-vdpa,device=. PEER is a host that is reachable through the device; it
# answers pings and runs `iperf3 -s`. GUEST is a free address in its network. Runs on this machine,
# as root. The last line says PASS or FAIL; each step prints what it did.
set -eu
if [ $# -ne 3 ]; then
	sed -n 's/^# \{0,1\}//; 2,8p' "$0" >&2
	exit 2
fi
device=$1 peer=${2%/*} guest=$3
pyvmm=$(dirname "$0")/../.venv/bin/pyvmm
name=vdpa-proof-$$
report=$(mktemp)
trap 'rm -f "$report"' EXIT

# The guest's part: $1 is the peer, $2 the guest's address.
part='
set -eu
say() { echo "== $*"; }
up() { ip addr show dev eth0 | grep -q "inet ${2%/*}/" || ip addr add "$2" dev eth0; ip link set eth0 up; }
say ping; up "$@"; ping -q -c 20 -i 0.1 "$1"
say TCP to the peer; iperf3 -c "$1" -t 5 | tail -4
say TCP from the peer; iperf3 -c "$1" -t 5 -R | tail -4
say UDP; iperf3 -c "$1" -u -b 20M -l 400 -t 5 | tail -4
say driver; for i in 1 2 3; do
	rmmod virtio_net; modprobe virtio_net; up "$@"; ping -q -c 5 -i 0.1 "$1" | grep received
done
say queue pairs; ethtool -l eth0 | grep Combined
'
run() {
	"$pyvmm" run --host local --timeout 300 --report "$report" --net "vhost-vdpa,device=$device,$1" \
		-- sh -c "$part" sh "$peer" "$guest"
}

"$pyvmm" doctor | grep -E '^(vdpa|vduse|kvm) ' || true
failed=0
run "guest=$guest" || failed=1
grep -o '"tx_possible_repeats": [0-9]*' "$report" || true

if grep -q '"suspend": true' "$report"; then
	echo "== 20 live switches under pings, away from the device and back"
	"$pyvmm" run --host local --detach=/dev/null --name "$name" \
		--net "vhost-vdpa,device=$device,guest=$guest,switchable=emulated" -- sleep 600
	for i in 1 2 3 4 5 6 7 8 9 10; do
		"$pyvmm" switch --host local "$name" emulated || failed=1
		"$pyvmm" switch --host local "$name" vhost-vdpa || failed=1
	done
	"$pyvmm" quit --host local "$name"
else
	echo "== no live switches: the device cannot be suspended"
fi
[ $failed = 0 ] && echo PASS || echo FAIL
exit $failed
