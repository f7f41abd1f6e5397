#!/bin/sh
# Runs what the tests have for both stores on every kind of Redis: a single server, at a Unix socket, behind
# TLS with a demanded client certificate, a trio under sentinels, and a cluster of three masters and three
# replicas. Takes minutes, so `scripts/test.sh` runs it on a single server only.
#
# usage: scripts/engines.sh [FILTER …]      (default: the tests that use both stores)
set -eu
me="engines"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
case ${1:-} in -*) usage ;; esac
tools redis-server redis-cli:redis-tools openssl
[ $# -gt 0 ] || set -- onboarding:: sign_csr:: revocation:: enrolment:: health::right
cd "$root"
TEST_ENGINES=all cargo test --locked --test service -- "$@"
