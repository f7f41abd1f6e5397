#!/bin/sh
# Has axe-core look at the page: nothing serious may keep anybody from using it. By hand: it fetches
# axe-core by npm, into the build folder.
#
# usage: .ci/check-page.sh
set -eu
me="check-page"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"
cd "$root"
tools npm chromium zbarimg:zbar-tools
npm install --silent --no-save --prefix "$build/axe" axe-core
MPL_AXE=$build/axe/node_modules/axe-core/axe.min.js cargo test --locked --test service -- page::
