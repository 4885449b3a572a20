#!/bin/sh
# tests/fuzz/run.sh [SECONDS [SEED]]: build the fuzz programs with ASan and UBSan and run each for SECONDS/2 (default 20 in all).
# The same seed gives the same inputs. Exit status 0: no crash, no loop, no leak.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
seconds=${1:-20}
seed=${2:-1}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT INT TERM
flags="-std=gnu11 -D_GNU_SOURCE -O1 -g -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror -fno-omit-frame-pointer
-fsanitize=address,undefined -fno-sanitize-recover=all -I$here -I$here/../../cext -pthread"
for name in vring net; do
    # shellcheck disable=SC2086
    ${CC:-gcc} $flags -o "$out/fuzz_$name" "$here/fuzz_$name.c" "$here/fuzz_main.c" "$here/../../cext/vring.c" \
        "$here/../../cext/vring_packed.c" "$here/../../cext/dirty_log.c" \
        "$here/../../cext/inflight.c" "$here/../../cext/thread.c" "$here/../../cext/event.c" \
        "$here/../../cext/flow_hash.c" "$here/../../cext/cable.c" "$here/../../cext/capture.c" \
        "$here/../../cext/filter.c" "$here/../../cext/confine.c" "$here/../../cext/inject.c" \
        "$here/../../cext/intx.c" "$here/../../cext/relay.c" "$here/../../cext/ioctl.c"
done
for name in vring net; do
    cd "$out"
    if ! "$out/fuzz_$name" "$((seconds / 2))" "$seed"; then
        [ ! -e crash.bin ] || { cp crash.bin "$here/crash-$name.bin"; echo "input saved as $here/crash-$name.bin" >&2; }
        exit 1
    fi
done
