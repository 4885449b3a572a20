#!/bin/sh
# tests/fuzz/race.sh [SECONDS]: build race_net and race_bus with ThreadSanitizer, and again with ASan
# and UBSan; and race_net without either, so that its worker has its list of system calls. Run each
# for SECONDS/5 (default 10 in all). Exit status 0: no race, no memory error, no call but those.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cext=$here/../../cext
seconds=${1:-10}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT INT TERM
# -Wno-tsan: ThreadSanitizer takes no notice of fences. They order no plain memory accesses here, so
# it misses nothing by that.
flags="-std=gnu11 -D_GNU_SOURCE -O1 -g -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror -Wno-tsan
-fno-omit-frame-pointer -fno-sanitize-recover=all -I$cext -pthread
-Dpthread_mutex_clocklock=race_clocklock"
# Older runtimes of ThreadSanitizer refuse more random address bits than 28 (vm.mmap_rnd_bits).
fixed="setarch -R"
$fixed true 2>/dev/null || fixed=
for sanitizer in thread address,undefined none; do
    with=-fsanitize=$sanitizer
    [ "$sanitizer" != none ] || with=
    # shellcheck disable=SC2086
    ${CC:-gcc} $flags $with -o "$out/race_net-$sanitizer" "$here/race_net.c" \
        "$here/clocklock.c" "$cext/net_worker.c" "$cext/thread.c" "$cext/event.c" "$cext/inflight.c" \
        "$cext/vring.c" "$cext/vring_packed.c" "$cext/dirty_log.c" "$cext/flow_hash.c" \
        "$cext/cable.c" "$cext/capture.c" "$cext/filter.c" "$cext/impair.c" \
        "$cext/confine.c" "$cext/inject.c" "$cext/intx.c" "$cext/relay.c" "$cext/ioctl.c"
done
for sanitizer in thread address,undefined; do
    # shellcheck disable=SC2086
    ${CC:-gcc} $flags "-fsanitize=$sanitizer" -o "$out/race_bus-$sanitizer" "$here/race_bus.c" \
        "$cext/bus.c" "$cext/serial.c" "$cext/pipe.c" "$cext/trace.c" "$cext/rtc.c" \
        "$cext/pmtimer.c" "$cext/intx.c" "$cext/relay.c" "$cext/thread.c" "$cext/event.c" \
        "$cext/confine.c" "$cext/ioctl.c"
done
for sanitizer in thread address,undefined; do
    # shellcheck disable=SC2086
    TSAN_OPTIONS=halt_on_error=1 $fixed "$out/race_net-$sanitizer" "$((seconds / 5))"
    # shellcheck disable=SC2086
    TSAN_OPTIONS=halt_on_error=1 $fixed "$out/race_bus-$sanitizer" "$((seconds / 5))"
done
"$out/race_net-none" "$((seconds / 5))"
