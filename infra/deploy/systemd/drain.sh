#!/bin/sh
# Ends the worker of a machine of EC2 in good time: before a spot machine is taken back (two minutes), or before its group
# ends it. Running builds end within the worker's grace, what is left goes elsewhere.
set -eu
metadata=${METADATA:-http://169.254.169.254/latest}

look() {
  token=$(curl -fsS -m 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$metadata/api/token") || return 1
  curl -fsS -m 5 -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/$1" 2>/dev/null
}

while :; do
  if look spot/instance-action >/dev/null; then why="the spot machine is taken back"; break; fi
  if [ "$(look autoscaling/target-lifecycle-state || true)" = Terminated ]; then why="its group ends this machine"; break; fi
  sleep "${EVERY_S:-5}"
done
echo "drover drain: $why; the worker is stopped" >&2
systemctl stop drover-worker
