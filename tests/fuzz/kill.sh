#!/bin/sh
# tests/fuzz/kill.sh: build kill_inflight and run it. Exit status 0: wherever a back-end is killed,
# its heir goes on.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cext=$here/../../cext
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT INT TERM
# Compiled as the product is: the optimizer decides which store comes first.
${CC:-gcc} -std=gnu11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror \
    -I"$cext" -pthread -o "$out/kill_inflight" "$here/kill_inflight.c" "$cext/inflight.c" \
    "$cext/vring.c" "$cext/vring_packed.c" "$cext/dirty_log.c"
"$out/kill_inflight"
