#!/bin/sh
# Builds the program for an embedded Linux: one static file that needs nothing else on the system.
#
# usage: scripts/build-static.sh [TARGET]
#
#   x86_64-unknown-linux-musl (the default), aarch64-unknown-linux-musl,
#   armv7-unknown-linux-musleabihf (hard float); x86_64, aarch64 and armv7 for short
#
# It leaves dist/<TARGET>/mqtt-publisher-lite, proven to be static and for that processor, and tried
# by scripts/smoke.sh, under qemu-user-static where the processor is another. The linker and musl come
# from Zig (pip: ziglang, cargo-zigbuild). The standard library is rustup's, where rustup can have
# that target; else it is built from Debian's rust-web-src by Debian's rustc-web, whose versions
# match. As root on Debian, what is missing of Debian is installed.
#
#   SMOKE=0       does not run what was built
#   STD=debian    does not ask rustup
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${CARGO_TARGET_DIR:-$root/target}
name=mqtt-publisher-lite

fail() {
    echo "build-static: $*" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

debian() {
    if ! has apt-get || [ "$(id -u)" -ne 0 ]; then
        fail "missing: $* (these are Debian's names; as root on Debian, this script installs them)"
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

case ${1:-x86_64} in
    x86_64 | x86_64-unknown-linux-musl) target=x86_64-unknown-linux-musl machine=x86-64 qemu=x86_64 ;;
    aarch64 | aarch64-unknown-linux-musl) target=aarch64-unknown-linux-musl machine=aarch64 qemu=aarch64 ;;
    armv7 | armv7-unknown-linux-musleabihf) target=armv7-unknown-linux-musleabihf machine=ARM qemu=arm ;;
    *) fail "unknown target $1" ;;
esac

has file || debian file

# --- The linker, in a virtual environment of its own.
venv=$build/static-venv
if ! [ -x "$venv/bin/cargo-zigbuild" ] || ! "$venv/bin/python" -c 'import ziglang' 2>/dev/null; then
    has python3 || debian python3-venv
    python3 -c 'import ensurepip, venv' 2>/dev/null || debian python3-venv
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check ziglang cargo-zigbuild
fi
PATH=$venv/bin:$PATH
export PATH

# --- The standard library: rustup's for the target, or Debian's from its source.
rustup_has_target() {
    if [ "${STD:-}" = debian ] || ! has rustup; then return 1; fi
    rustup target list --installed 2>/dev/null | grep -qx "$target" && return
    echo "asking rustup for $target"
    timeout 300 rustup target add "$target" >/dev/null 2>&1
}

compile() {
    if rustup_has_target; then
        echo "building with $(rustc --version), standard library by rustup"
        cargo zigbuild --locked --profile static --manifest-path "$root/Cargo.toml" --target "$target"
        return
    fi
    if ! [ -x /usr/bin/rustc ] || ! [ -e "$(/usr/bin/rustc --print sysroot)/lib/rustlib/src" ]; then
        debian rustc-web rust-web-src
    fi
    echo "building with $(/usr/bin/rustc --version), standard library from Debian's source"
    RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Clink-self-contained=no \
        cargo zigbuild --locked --profile static -Zbuild-std=std,panic_unwind \
        --manifest-path "$root/Cargo.toml" --target "$target"
}

compile
built=$build/$target/static/$name
dist=$root/dist/$target
mkdir -p "$dist/data"
cp "$built" "$dist/$name"

# --- Proof: no interpreter, no library, the right processor.
what=$(file -b "$dist/$name")
echo "$what"
case $what in *"statically linked"* | *"static-pie linked"*) ;; *) fail "not static" ;; esac
case $what in *interpreter*) fail "it asks for an interpreter" ;; esac
case $what in *"$machine"*) ;; *) fail "not for $machine" ;; esac
echo "size: $(wc -c <"$dist/$name") bytes"

# --- Proof: it runs.
[ "${SMOKE:-1}" != 0 ] || exit 0
run=$dist/$name
if [ "$(uname -m)" != "${target%%-*}" ]; then
    has "qemu-$qemu-static" || debian qemu-user-static
    run=$build/$target/run-$name
    # The smoke test wants one program.
    printf '#!/bin/sh\nexec qemu-%s-static "%s" "$@"\n' "$qemu" "$dist/$name" >"$run"
    chmod +x "$run"
fi
"$run" --version
MPL_BIN=$run "$root/scripts/smoke.sh"
