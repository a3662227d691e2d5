#!/bin/sh
# A worker on a Mac: launchd reads no file of variables. DROVER and ETC are other places than the usual ones.
set -eu
etc=${ETC:-/etc/drover}
[ -r "$etc/worker.env" ] || { echo "drover worker: $etc/worker.env is missing; infra/deploy/worker.env shows it" >&2; exit 2; }
set -a
. "$etc/worker.env"
set +a
for name in HEAD ADDRESS NAME; do
  eval "value=\${$name:-}"
  [ -n "$value" ] || { echo "drover worker: $etc/worker.env does not set $name" >&2; exit 2; }
done
# Options are words.
# shellcheck disable=SC2086
exec "${DROVER:-/opt/drover/.venv/bin/drover}" worker --head "$HEAD" --host "$ADDRESS" --name "$NAME" \
  --ray-token "$etc/ray-token" --state-dir "${STATE:-/var/lib/drover-worker}" ${WORKER_OPTIONS:-}
