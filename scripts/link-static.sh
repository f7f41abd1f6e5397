#!/bin/sh
# The linker of scripts/build-static.sh: Zig's, with what Zig's own front end has no option for. The
# program gets an address of its own at each start (static-pie; left alone, Zig makes a program with
# fixed ones), its relocations are packed (90 kB less), and functions that came out the same are one.
#
# rustc calls it; cargo-zigbuild names Zig's front end to it.
set -eu
target=$(echo "${MPL_STATIC_TARGET:?scripts/build-static.sh sets it}" | tr a-z- A-Z_)
front=$(printenv "CARGO_TARGET_${target}_LINKER") # which cargo-zigbuild sets

# Zig links once in its own way, and says how.
said=$("$front" "$@" -pie -v 2>&1) || {
    echo "$said" >&2
    exit 1
}
how=$(echo "$said" | sed -n 's/^ld\.lld //p' | tail -1)
[ -n "$how" ] || {
    echo "link-static: Zig does not say how it links: $said" >&2
    exit 1
}
# shellcheck disable=SC2086 # Zig puts one space between words; build-static.sh allows none in paths
exec "${MPL_STATIC_PYTHON:?}" -m ziglang ld.lld $how --pack-dyn-relocs=relr --icf=all
