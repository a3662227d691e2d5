#!/bin/sh
# Takes a Mac out of its farm: running builds end, the service and the token go. What was built and drover itself stay.
set -eu
root=${DROVER_ROOT:-}
plist=$root/Library/LaunchDaemons/org.drover.worker.plist
runs() { launchctl print system/org.drover.worker >/dev/null 2>&1; }

[ "$(id -u)" -eq 0 ] || { echo "drover leave: this wants root" >&2; exit 1; }
if runs; then
  launchctl bootout system/org.drover.worker || true
  # As long as launchd lets it end, and a minute.
  tries=376
  while runs; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || { echo "drover leave: the worker still runs; see /var/log/drover-worker.log" >&2; exit 1; }
    sleep "${RETRY_S:-10}"
  done
fi
rm -f "$plist" "$root/etc/drover/ray-token" "$root/etc/drover/worker.env"
echo "drover leave: this Mac has left the farm" >&2
