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
cd "$(dirname "$0")/.."
msrv=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
[ -n "$msrv" ] || { echo "Cargo.toml names no rust-version" >&2; exit 1; }

if ! command -v rustup >/dev/null 2>&1; then
    echo "rustup is needed to have Rust $msrv beside the one installed" >&2
    exit 1
fi
if ! rustup run "$msrv" rustc --version >/dev/null 2>&1; then
    if [ "${1:-}" != --install ]; then
        echo "Rust $msrv is not installed: .ci/check-msrv.sh --install" >&2
        exit 1
    fi
    rustup toolchain install "$msrv" --profile minimal --no-self-update
fi

# A folder of its own: two compilers in one would rebuild everything at every turn.
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/msrv rustup run "$msrv" \
    cargo check --locked --workspace --all-targets
echo "compiles with Rust $msrv"
