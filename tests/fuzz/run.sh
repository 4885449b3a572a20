#!/bin/sh
# tests/fuzz/run.sh [SECONDS [SEED]]: build the fuzz programs with ASan and UBSan, without libFuzzer.
# Each runs the inputs of tests/fuzz/corpus; vring and net then run inputs made from SEED (default 1)
# for SECONDS/2 each (default 20 in all). The same seed gives the same inputs.
# Exit status 0: no crash, no loop, no leak.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cext=$here/../../cext
seconds=${1:-20}
seed=${2:-1}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT INT TERM
flags="-std=gnu11 -D_GNU_SOURCE -O1 -g -Wall -Wextra -Wshadow -Wvla -Wconversion -Werror -fno-omit-frame-pointer
-fsanitize=address,undefined -fno-sanitize-recover=all -I$here -I$cext -pthread"

# build NAME SOURCE...: of cext
build() {
    name=$1
    shift
    sources=
    for source in "$@"; do sources="$sources $cext/$source.c"; done
    # shellcheck disable=SC2086
    ${CC:-gcc} $flags -o "$out/fuzz_$name" "$here/fuzz_$name.c" "$here/fuzz_main.c" $sources
}

worker="vring vring_packed dirty_log inflight thread event flow_hash cable capture filter impair
confine inject intx relay ioctl"
# shellcheck disable=SC2086
for name in vring net life; do build $name $worker; done
build flow flow_hash
build filter filter
build bus bus serial pipe trace rtc pmtimer intx relay thread event confine ioctl
cd "$out"
for name in vring net life flow filter bus; do
    mkdir "$name"
    python3 -m zipfile -e "$here/corpus/$name.zip" "$name"
    "$out/fuzz_$name" "$name"/*
    echo "$name: $(find "$name" -type f | wc -l) inputs of the corpus, no crash"
done
for name in vring net; do
    if ! "$out/fuzz_$name" "$((seconds / 2))" "$seed"; then
        [ ! -e crash.bin ] || { cp crash.bin "$here/crash-$name.bin"; echo "input saved as $here/crash-$name.bin" >&2; }
        exit 1
    fi
done
