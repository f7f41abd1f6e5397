#!/bin/sh
# Measures the service beside its yardsticks and writes docs/bench.md and docs/bench.svg.
#
# usage: scripts/bench.sh [--quick | --rounds N] [--no-build] [--out DIR]
#
#   --quick      one short round, to see that everything runs; the figures mean nothing
#   --rounds N   this many rounds, two minutes each; else 5
#   --no-build   measure the programs that are there
#   --out DIR    write there instead of docs/
#
# Everything is started here, on free ports, and stopped again: Redis, the service, and what it is
# measured against, each in turn within one round, several rounds over. All share the processors of
# this machine with the load, so compare the figures of one run only.
#   MPL_BIN        the program; else target/release, built if need be
#   MPL_UNBATCHED  the same, built with batches of one: measured beside it on a long way to Redis
# It needs Rust, python3, redis-server, redis-benchmark, redis-cli, wrk and openssl (Debian's names:
# python3 redis-server redis-tools wrk openssl).
set -eu
me="bench"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
compile=yes
quick=
rounds=5
out=$root/docs
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=--quick ;;
        --rounds)
            rounds=${2:?"--rounds needs a number"}
            shift
            ;;
        --no-build) compile= ;;
        --out)
            out=${2:?"--out needs a folder"}
            shift
            ;;
        *) usage ;;
    esac
    shift
done

has cargo || fail "cargo is not installed"
tools python3 redis-server redis-benchmark:redis-tools redis-cli:redis-tools wrk openssl

cd "$root"
if [ -n "$compile" ]; then
    cargo build --locked --release -p mqtt-publisher-lite -p tools --bins
    CARGO_TARGET_DIR=$build/peer cargo build --locked --release \
        --manifest-path tools/peer/Cargo.toml
fi
mkdir -p "$out"
exec python3 tools/measure.py \
    --program "${MPL_BIN:-$build/release/mqtt-publisher-lite}" \
    --unbatched "${MPL_UNBATCHED:-}" \
    --tools "$build/release" \
    --peers "$build/peer/release" \
    --out "$out" --rounds "$rounds" $quick
