#!/bin/sh
# Builds the program for an embedded Linux: one static file that needs nothing else on the system.
#
# usage: scripts/build-static.sh [TARGET]
#
#   x86_64-unknown-linux-musl (the default), aarch64-unknown-linux-musl,
#   armv7-unknown-linux-musleabihf (hard float); x86_64, aarch64 and armv7 for short
#
# It leaves dist/<TARGET>/mqtt-publisher-lite, proven to be static, position-independent and for that
# processor, and tried by scripts/smoke.sh, under qemu-user-static where the processor is another.
# The linker and musl come from Zig (pip: ziglang, cargo-zigbuild). The standard library is built
# from source, for size, which makes a tenth of the program: with rustup's rust-src if that is there
# or can be had, else by Debian's rustc-web with rust-web-src. Where neither can be, it is the one
# that rustup has for the target. As root on Debian, what is missing of Debian is installed.
#
#   SMOKE=0       does not run what was built
#   STD=...       where the standard library comes from: rust-src, debian, or prebuilt (by rustup)
set -eu
me="build-static"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
name=mqtt-publisher-lite

case ${1:-x86_64} in
    x86_64 | x86_64-unknown-linux-musl) target=x86_64-unknown-linux-musl machine=x86-64 qemu=x86_64 ;;
    aarch64 | aarch64-unknown-linux-musl) target=aarch64-unknown-linux-musl machine=aarch64 qemu=aarch64 ;;
    armv7 | armv7-unknown-linux-musleabihf) target=armv7-unknown-linux-musleabihf machine=ARM qemu=arm ;;
    *) fail "unknown target $1" ;;
esac

has file || debian file

# --- The linker, in a virtual environment of its own; the versions with which the size was measured.
# Not Zig 0.17: its C library has an allocator that keeps 16 bytes of what each request took, as
# scripts/soak.sh tells, and what C code allocates still comes from there.
linker="ziglang==0.15.2 cargo-zigbuild==0.24.1"
venv=$build/static-venv
if [ "$(cat "$venv/linker" 2>/dev/null)" != "$linker" ]; then
    has python3 || debian python3-venv
    python3 -c 'import ensurepip, venv' 2>/dev/null || debian python3-venv
    rm -rf "$venv"
    python3 -m venv "$venv"
    # shellcheck disable=SC2086 # two words
    "$venv/bin/pip" install --quiet --disable-pip-version-check $linker || fail "pip cannot have $linker"
    echo "$linker" >"$venv/linker"
fi
PATH=$venv/bin:$PATH
export PATH

case $root$build${CARGO_HOME:-$HOME}$PATH in *" "*) fail "a path with a space in it" ;; esac

# --- The standard library: from the source of rustup or Debian, or the one that rustup has built.
source_of() { echo "$("$1" --print sysroot)/lib/rustlib/src/rust"; }

use_rust_src() {
    rustc=$(command -v rustc) || return 1
    if ! [ -e "$(source_of "$rustc")/library" ]; then
        has rustup || return 1
        echo "asking rustup for rust-src"
        timeout 300 rustup component add rust-src >/dev/null 2>&1 || return 1
    fi
}

use_debian() {
    rustc=/usr/bin/rustc
    [ -x $rustc ] && [ -e "$(source_of $rustc)/library" ] && return
    has apt-get && [ "$(id -u)" -eq 0 ] || return 1
    debian rustc-web rust-web-src
}

use_prebuilt() {
    has rustup || return 1
    rustup target list --installed 2>/dev/null | grep -qx "$target" && return
    echo "asking rustup for $target"
    timeout 300 rustup target add "$target" >/dev/null 2>&1
}

std=
for choice in ${STD:-rust-src debian prebuilt}; do
    case $choice in
        rust-src) use_rust_src || continue ;;
        debian) use_debian || continue ;;
        prebuilt) use_prebuilt || continue ;;
        *) fail "STD=$choice" ;;
    esac
    std=$choice
    break
done
[ -n "$std" ] || fail "no standard library for $target: rustup's rust-src, Debian's rustc-web and rust-web-src, or rustup's target $target"

# Who built the program, and in which folder, is nobody's business, and takes room.
flags="-Cllvm-args=-inline-threshold=15 -Clinker=$root/scripts/link-static.sh"
set -- --locked --profile static --manifest-path "$root/Cargo.toml" --target "$target"
if [ "$std" != prebuilt ]; then
    flags="$flags -Clink-self-contained=no --remap-path-prefix=$(source_of "$rustc")/="
    set -- "$@" -Zbuild-std=std,panic_unwind -Zbuild-std-features=panic-unwind,optimize_for_size
    export RUSTC="$rustc" RUSTC_BOOTSTRAP=1
fi
# On x86_64 frame pointers make the tables of unwinding smaller by more than the code grows; 64-bit ARM
# has them anyway, and 32-bit ARM has other tables.
case $target$std in
    x86_64*prebuilt) flags="$flags -Cforce-frame-pointers=yes" ;;
    x86_64*) flags="$flags -Zunstable-options -Cforce-frame-pointers=non-leaf" ;;
esac
cargo fetch --locked --manifest-path "$root/Cargo.toml" --target "$target"
for registry in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/; do
    flags="$flags --remap-path-prefix=$registry="
done
echo "building with $(${RUSTC:-rustc} --version), standard library: $std"
MPL_STATIC_TARGET=$target MPL_STATIC_PYTHON=$venv/bin/python RUSTFLAGS=$flags cargo zigbuild "$@"
built=$build/$target/static/$name
dist=$root/dist/$target
mkdir -p "$dist/data"
cp "$built" "$dist/$name"

# --- Proof: no interpreter, no library, no fixed addresses, the right processor.
what=$(file -b "$dist/$name")
echo "$what"
case $what in *"static-pie linked"*) ;; *) fail "not static, or at fixed addresses" ;; esac
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

# --- What it takes, idle: tokens in memory, and a CA that is there already.
[ "$run" = "$dist/$name" ] || exit 0
server=
make_work

leave() {
    [ -z "$server" ] || end "$server"
}

for start in first second; do
    env -i DATA_DIR="$work/data" HTTP_HOST=127.0.0.1 PORT=$((20000 + $$ % 12000)) "$run" 2>"$work/log" &
    server=$!
    tries=0
    until grep -q 'Provisioning API' "$work/log"; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || fail "no $start start: $(cat "$work/log")"
        sleep 0.1
    done
    sleep 6 # five until the threads that nobody needs have ended
    resident=$(sed -n 's/^\(VmRSS\|RssAnon\|RssFile\):[ \t]*/\1 /p' "/proc/$server/status" | tr '\n' ' ')
    kill "$server"
    wait "$server"
    server=
done
echo "idle: $resident"
