#!/bin/sh
# tools/measure-here.sh [--host testbed] [--rounds N] [--seconds S] [--dry-run] [DIRECTORY]
#
# Climbs the ladder (docs/ladder.md) on this machine: loads the kernel's modules, reserves huge
# pages, measures, and puts the number of huge pages back. Writes ladder.txt, ladder.json and
# ladder.svg to DIRECTORY, which must not exist (default: a new one in the current directory), and
# prints its name. Takes about ten minutes on a real processor. Needs root, and an image
# (pyvmm image build). With --host testbed it measures in the testbed, as any user.
# Exit status: that of pyvmm compare; 2 for bad usage.
set -eu

rounds=4 seconds=1.5 host=local dry='' out=''
usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
    --rounds) rounds=${2:?} && shift ;;
    --seconds) seconds=${2:?} && shift ;;
    --host) host=${2:?} && shift ;;
    --dry-run) dry=1 ;;
    -*) usage ;;
    *) [ -z "$out" ] && out=$1 || usage ;;
    esac
    shift
done
case $host in local | testbed) ;; *) usage ;; esac

here=$(cd "$(dirname "$0")/.." && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
out=${out:-ladder-$(date +%Y%m%d-%H%M%S)}
pages=/proc/sys/vm/nr_hugepages
before=''

run() {
    printf '%s\n' "+ $*" >&2
    [ -n "$dry" ] || "$@"
}
# In this repository's pyvmm, wherever the shell stands.
pyvmm() { PYTHONPATH=$here run "$python" -P -m pyvmm "$@"; }
put_back() {
    [ -z "$before" ] || run sh -c "echo $before > $pages"
}

if [ "$host" = local ] && [ -z "$dry" ] && [ "$(id -u)" != 0 ]; then
    echo "measure-here.sh: modules and huge pages need root; use sudo, or --host testbed" >&2
    exit 2
fi
if [ -e "$out" ]; then
    echo "measure-here.sh: $out exists; name another directory" >&2
    exit 2
fi

trap put_back EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
run mkdir "$out"
# 128 pages of 2 MiB hold the guest's 256 MiB; the kernel may find fewer, and then the rung says so.
if [ "$host" = local ]; then
    for module in tun vhost_net vdpa vduse vhost_vdpa; do
        run modprobe -q "$module" || echo "measure-here.sh: no module $module" >&2
    done
    [ -n "$dry" ] || before=$(cat $pages)
    run sh -c "[ \$(cat $pages) -ge 160 ] || echo 160 > $pages"
else
    pyvmm testbed -- sh -c "[ \$(cat $pages) -ge 160 ] || echo 160 > $pages"
fi

status=0 table=$out/ladder.txt
[ -z "$dry" ] || table=/dev/null
pyvmm compare --ladder --host "$host" --rounds "$rounds" --seconds "$seconds" \
    --json "$out/ladder.json" --svg "$out/ladder.svg" >"$table" || status=$?
cat "$table"
[ -n "$dry" ] || echo "measure-here.sh: results are in $out" >&2
exit $status
