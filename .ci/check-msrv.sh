#!/bin/sh
# Checks that the crate, its tests included, compiles with the Rust version that Cargo.toml names.
#
# usage: .ci/check-msrv.sh [--install]
#
# It needs rustup with that toolchain; with --install it is installed (about 200 MB, and it does not
# become the default). What needs no second compiler is checked by every test run: that no
# dependency asks for a newer Rust (tests/house/architecture.rs), and by clippy's incompatible_msrv that
# nothing newer than that version is used of the standard library.
set -eu
me="msrv"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"
cd "$root"
msrv=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
[ -n "$msrv" ] || fail "Cargo.toml names no rust-version"

has rustup || fail "rustup is needed to have Rust $msrv beside the one installed"
if ! rustup run "$msrv" rustc --version >/dev/null 2>&1; then
    [ "${1:-}" = --install ] || fail "Rust $msrv is not installed: .ci/check-msrv.sh --install"
    rustup toolchain install "$msrv" --profile minimal --no-self-update
fi

# A folder of its own: two compilers in one would rebuild everything at every turn.
CARGO_TARGET_DIR=$build/msrv rustup run "$msrv" \
    cargo check --locked --workspace --all-targets
echo "compiles with Rust $msrv"
