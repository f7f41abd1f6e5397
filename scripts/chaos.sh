#!/bin/sh
# Chaos: three instances on one Redis, and everything that can break breaks under a load, for ten minutes.
#
# usage: scripts/chaos.sh [MINUTES] [SEED]      (default 10, and any seed)
#
# Six clients onboard 300 devices, replace and revoke now and then, and present the tokens, a third of
# them to two instances at once. Meanwhile, one or two at a time: instances are killed (also to start
# under a clock ten minutes ahead), stopped, cut off from Redis by a proxy in every way (refused,
# swallowed, held back so that commands arrive late), and their clocks jump by ten minutes; Redis is
# stopped, and killed to come back with the data of the moment before, empty, or from an older file.
# All with OUTAGE_REDEEM=none, which promises most.
#
# The whole history is judged at the end, when what was never redeemed has been presented once more:
#   - no token has two certificates (by the answers, and by the folders of all instances);
#   - no kill that was answered with 200 misses a token that was answered before it;
#   - what was answered with 200, and was not killed, can be redeemed.
#   - every instance serves from Redis again.
# A breach that a sentence of docs/redis.md names is counted with that sentence; any other ends it with 1,
# and its history is printed: what was asked of the device, and what was done then. The same seed does
# the same things in the same order.
#   MPL_BIN     the program; else target/release, else target/debug
#   CHAOS_BIN   the load and the judge, `chaos` of tools/; else beside those
# It needs redis-server, redis-cli and the library of faketime.
set -eu
me="chaos"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
case ${1:-} in -*) usage ;; esac
tools redis-server redis-cli:redis-tools faketime
find_service
chaos=$(program "${CHAOS_BIN:-$(dirname "$bin")/chaos}")
exec "$chaos" "${1:-10}" "$bin" ${2:+"$2"}
