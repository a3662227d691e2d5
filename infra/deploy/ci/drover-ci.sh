#!/bin/sh
# Any other CI: builds the Nix file of a checkout on the farm. Call it in the checkout, with arguments of `drover build`,
# such as `default.nix --branch "$BRANCH" --supersede`: what an older push of the branch still builds ends.
#
# Environment (infra/docs/ci.md says what it holds):
#   DROVER_URL, DROVER_CACHE_KEY, DROVER_REQUIREMENT
#   DROVER_TOKEN, or DROVER_TOKEN_FILE
set -eu

[ $# -gt 0 ] || set -- default.nix
command -v nix-build > /dev/null || { echo "install Nix first" >&2; exit 4; }

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet "$DROVER_REQUIREMENT"

# Evaluates here, builds on the farm, and waits; the status is that of `drover build`.
"$tools/bin/drover" build "$@" --json --summary summary.md > result.json

# What the farm has built is fetched and not built again: here, in later jobs, and by everybody who trusts the key.
export NIX_CONFIG="extra-substituters = $DROVER_URL/cache
extra-trusted-public-keys = $DROVER_CACHE_KEY"
unset DROVER_TOKEN DROVER_TOKEN_FILE
nix-build "$1" --max-jobs 0 --out-link result
ls -d result*
