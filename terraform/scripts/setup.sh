# Makes a fresh machine the head, a coordinator or a worker of a drover farm. Lines before this one set:
#   ROLE          coordinator, head or worker
#   SOURCE_URL    an archive of drover (tar.gz) and
#   SOURCE_SHA256 its hash
#   HEAD          host:port of the Ray head
#   ADDRESS       this machine's own address in the farm's network, or
#   NETWORK       that network, in which it looks for it; neither: EC2 is asked
#   NAME          of a worker; empty: what EC2 calls the machine
#   OPTIONS       further options of `drover worker`
#   GRACE_S       seconds in which running builds may end
#   WATCH         yes: drain the worker when EC2 is to take the machine
#   TOKEN_SECRET  name of the secret with the Ray token in Secrets Manager: the first coordinator puts it there, or
#   TOKEN_FILE    a file with it, which somebody else puts there (ssh)
#   FARM_SECRET   name of the secret with what coordinators share, which the first one makes; empty: they lie on its disk
#   FIRST         no: this coordinator stands by for one that makes the secrets
#   HEAD_HERE     no: the head is another machine
#   DATABASE      host/name of PostgreSQL, and
#   DATABASE_SECRET  the secret with its user and password (coordinator)
#   GIVEN_ENV     a file with variables of the coordinator (credentials of the bucket) that somebody else puts there, and
#   ENDPOINT      of that bucket
#   DISK          a device with ext4 for /var/lib/drover
#   FARM_TOML     settings (coordinator, head)
# It runs as root, says what it does on standard error, and fails with one sentence. It may be run again: another archive is
# then an upgrade, before which running builds end.
set -eu

say() { echo "drover set-up: $*" >&2; }
die() { say "$*"; exit 1; }
root=${DROVER_ROOT:-}
etc=$root/etc/drover
secrets=$root/var/lib/drover/secrets

need() {
  for name in "$@"; do
    eval "value=\${$name:-}"
    [ -n "$value" ] || die "$name is not set"
  done
}

# Runs a command until it is true, ten minutes at most.
await() {
  why=$1
  shift
  tries=${tries_at_most:-60}
  until "$@"; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || die "$why"
    sleep "${RETRY_S:-10}"
  done
}

# From standard input, never with a moment in which others can read it; false where nothing came.
keep() { (umask 077 && cat >"$1.new" && [ -s "$1.new" ] && mv "$1.new" "$1"); }

# Credentials of the machine's role; no secret is in user data, in the state of Terraform or in an argument.
secret() { aws secretsmanager get-secret-value --secret-id "$1" --query SecretString --output text 2>/dev/null; }
put_secret() { aws secretsmanager put-secret-value --secret-id "$1" --secret-string file:///dev/stdin >/dev/null; }
token() { if [ -n "${TOKEN_FILE:-}" ]; then cat "$TOKEN_FILE" 2>/dev/null; else secret "$TOKEN_SECRET"; fi; }
take_token() { token | keep "$1"; }
await_token() {
  if [ -n "${TOKEN_FILE:-}" ]; then
    await "no Ray token came as $TOKEN_FILE within ten minutes; did the run of Terraform that sends it end?" take_token "$1"
  else
    # The coordinator may start at the same time as this machine.
    await "the secret $TOKEN_SECRET has no value after ten minutes; does the coordinator run?" take_token "$1"
  fi
}

metadata() {
  token=$(curl -fsS -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' http://169.254.169.254/latest/api/token)
  curl -fsS -H "X-aws-ec2-metadata-token: $token" "http://169.254.169.254/latest/meta-data/$1"
}

# The address of this machine in the farm's network, which a cloud may attach after the start.
in_network() {
  ADDRESS=$(ip -4 -o addr show | python3 -c 'import ipaddress, sys
found = [line.split()[3].partition("/")[0] for line in sys.stdin]
print(next((one for one in found if ipaddress.ip_address(one) in ipaddress.ip_network(sys.argv[1])), ""), end="")' "$NETWORK")
  [ -n "$ADDRESS" ]
}

own_address() {
  [ -z "${ADDRESS:-}" ] || return 0
  if [ -n "${NETWORK:-}" ]; then
    await "this machine has no address in $NETWORK after ten minutes" in_network
  else
    ADDRESS=$(metadata local-ipv4) || die "EC2 does not tell this machine's address; set ADDRESS or NETWORK elsewhere"
  fi
}

hash_of() { if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1; }

mac_runs() { launchctl print system/org.drover.worker >/dev/null 2>&1; }
mac_ended() { ! mac_runs; }

# Ends what runs here; a worker lets its builds end.
stop_services() {
  if [ "$(uname -s)" = Darwin ]; then
    if mac_runs; then
      launchctl bootout system/org.drover.worker || true
      # As long as launchd lets it end, and a minute.
      tries_at_most=376
      await "the worker still runs; see /var/log/drover-worker.log" mac_ended
      tries_at_most=
    fi
  else
    for unit in $units; do
      if systemctl -q is-active "$unit"; then systemctl stop "$unit"; fi
    done
  fi
}

install_drover() {
  here=$root/opt/drover
  [ "$(cat "$here/.source-sha256" 2>/dev/null)" != "$SOURCE_SHA256" ] || return 0
  archive=$(mktemp)
  curl -fsSL --retry 5 -o "$archive" "$SOURCE_URL" || die "the archive $SOURCE_URL cannot be fetched"
  found=$(hash_of "$archive")
  [ "$found" = "$SOURCE_SHA256" ] || die "the archive $SOURCE_URL has the hash $found, not $SOURCE_SHA256"
  rm -rf "$here.new"
  mkdir -p "$here.new"
  tar -xzf "$archive" -C "$here.new" --strip-components=1
  rm -f "$archive"
  printf '%s' "$SOURCE_SHA256" >"$here.new/.source-sha256"
  stop_services
  # What an image or the version before has installed may still do: `./run setup` looks.
  [ ! -d "$here/.venv" ] || mv "$here/.venv" "$here.new/.venv"
  rm -rf "$here.old"
  [ ! -d "$here" ] || mv "$here" "$here.old"
  mv "$here.new" "$here"
  rm -rf "$here.old"
}

mount_disk() {
  [ -n "${DISK:-}" ] || return 0
  await "the disk $DISK is not there after ten minutes" test -e "$DISK"
  mkdir -p "$root/var/lib/drover"
  # A service whose state lies there does not start without it.
  grep -qs " /var/lib/drover " "$root/etc/fstab" || printf '%s /var/lib/drover ext4 defaults,nofail 0 2\n' "$DISK" >>"$root/etc/fstab"
  mountpoint -q "$root/var/lib/drover" || mount "$root/var/lib/drover"
}

# Settings, the user and the directory of secrets of head and coordinator.
server() {
  need HEAD FARM_TOML
  mount_disk
  id drover >/dev/null 2>&1 || useradd --system --home-dir /var/lib/drover drover
  printf '%s\n' "$FARM_TOML" >"$etc/farm.toml"
  printf 'HEAD=%s\n' "$HEAD" >"$etc/head.env"
  mkdir -p "$secrets"
  chmod 700 "$secrets"
}

head_alone() {
  server
  await_token "$secrets/ray-token"
  chown -R drover:drover "$secrets"
}

# What coordinators share, as one object of JSON: into the directory, and out of it.
# shellcheck disable=SC2016
take_farm_secrets() {
  secret "$FARM_SECRET" | python3 -c 'import json, os, sys
os.umask(0o077)
for name, value in json.loads(sys.stdin.read() or "{}").items():
    assert "/" not in name
    open(os.path.join(sys.argv[1], name), "w").write(value)' "$secrets" && [ -s "$secrets/cache-key" ]
}
made_farm_secrets() { [ -s "$secrets/api-token" ] && [ -s "$secrets/upload-secret" ] && [ -s "$secrets/cache-key" ]; }
give_farm_secrets() {
  await "the coordinator has made no secrets within ten minutes; journalctl -u drover-coordinator says why" made_farm_secrets
  (cd "$secrets" && python3 -c 'import json, os
print(json.dumps({name: open(name).read() for name in sorted(os.listdir()) if name != "ray-token"}), end="")') | put_secret "$FARM_SECRET"
}

coordinator_variables() {
  if [ -n "${DATABASE:-}" ]; then
    need DATABASE_SECRET
    url=$(secret "$DATABASE_SECRET" | python3 -c 'import json, sys, urllib.parse
login = json.load(sys.stdin)
print("postgresql+psycopg://" + ":".join(urllib.parse.quote(login[one], safe="") for one in ("username", "password")), end="")') \
      || die "the secret $DATABASE_SECRET has no user and password"
    for name in JOURNAL DERIVATIONS CACHE; do
      # systemd takes a percent sign as it is in a file of variables.
      printf 'DROVER_%s_DATABASE_URL=%s@%s\n' "$name" "$url" "$DATABASE"
    done
  fi
  [ -z "${GIVEN_ENV:-}" ] || cat "$GIVEN_ENV"
  [ -z "${ENDPOINT:-}" ] || printf 'AWS_ENDPOINT_URL=%s\n' "$ENDPOINT"
  # Two coordinators have the same settings but for this.
  [ -z "${ADDRESS:-}" ] || printf 'DROVER_RAY_HOST=%s\n' "$ADDRESS"
}

coordinator() {
  server
  [ -z "${GIVEN_ENV:-}" ] || await "no $GIVEN_ENV came within ten minutes; did the run of Terraform that sends it end?" test -s "$GIVEN_ENV"
  variables=$(coordinator_variables) || exit 1
  [ -z "$variables" ] || printf '%s\n' "$variables" | keep "$etc/coordinator.env"
  share=
  if [ -n "${FARM_SECRET:-}" ]; then
    if [ "${FIRST:-yes}" = no ]; then
      await "the secret $FARM_SECRET has no value after ten minutes; does the first coordinator run?" take_farm_secrets
    else
      # Where this machine replaces another, the farm has secrets already.
      take_farm_secrets || share=yes
    fi
  fi
  if [ -n "${TOKEN_FILE:-}" ] || [ "${FIRST:-yes}" = no ]; then
    await_token "$secrets/ray-token"
  elif [ ! -s "$secrets/ray-token" ] && ! take_token "$secrets/ray-token"; then
    python3 -c 'import secrets; print(secrets.token_hex(32), end="")' | keep "$secrets/ray-token"
    put_secret "$TOKEN_SECRET" <"$secrets/ray-token"
  fi
  chown -R drover:drover "$secrets"
}

worker() {
  need HEAD GRACE_S
  own_address
  await_token "$etc/ray-token"
  chmod 400 "$etc/ray-token"
  {
    printf 'HEAD=%s\n' "$HEAD"
    printf 'ADDRESS=%s\n' "$ADDRESS"
    printf 'NAME=%s\n' "${NAME:-$(metadata instance-id)}"
    printf 'WORKER_OPTIONS="%s"\n' "${OPTIONS:-}"
    printf 'DROVER_STOP_GRACE_S=%s\n' "$GRACE_S"
  } >"$etc/worker.env"
}

[ "$(id -u)" -eq 0 ] || die "this wants root"
need ROLE SOURCE_URL SOURCE_SHA256
case "$ROLE" in
  coordinator) if [ "${HEAD_HERE:-yes}" = no ]; then units=drover-coordinator; else units="drover-head drover-coordinator"; fi ;;
  head) units=drover-head ;;
  worker) if [ "${WATCH:-}" = yes ]; then units="drover-worker drover-drain"; else units=drover-worker; fi ;;
  *) die "ROLE is $ROLE, neither coordinator nor head nor worker" ;;
esac
[ -n "${TOKEN_FILE:-}" ] || need TOKEN_SECRET
mkdir -p "$etc"
case "$(uname -s)" in
  Linux)
    lacks=
    command -v curl >/dev/null || lacks="ca-certificates curl"
    command -v python3 >/dev/null || lacks="$lacks python3"
    [ -n "${TOKEN_FILE:-}" ] || command -v aws >/dev/null || lacks="$lacks awscli"
    # One word a package.
    # shellcheck disable=SC2086
    [ -z "$lacks" ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $lacks >&2; } ;;
  Darwin)
    command -v nix-store >/dev/null || [ -x /nix/var/nix/profiles/default/bin/nix-store ] || die "there is no Nix here: install it first, or name an image that has it (README, Macs)" ;;
esac
install_drover
settings() { cat "$etc"/*.env "$etc/farm.toml" 2>/dev/null | cksum; }
had=$(settings)
(cd "$root/opt/drover" && ./run setup) || die "drover could not set itself up; see the messages above"
case "$ROLE" in
  coordinator) coordinator ;;
  head) head_alone ;;
  worker) worker ;;
esac
# Services read their settings when they start.
[ "$had" = "$(settings)" ] || stop_services
if [ "$(uname -s)" = Darwin ]; then
  cp "$root/opt/drover/infra/deploy/launchd/org.drover.worker.plist" "$root/Library/LaunchDaemons/"
  mac_runs || launchctl bootstrap system "$root/Library/LaunchDaemons/org.drover.worker.plist"
else
  mkdir -p "$root/etc/systemd/system"
  for unit in $units; do
    cp "$root/opt/drover/infra/deploy/systemd/$unit.service" "$root/etc/systemd/system/"
  done
  systemctl daemon-reload
  for unit in $units; do systemctl enable --now "$unit"; done
fi
[ -z "${share:-}" ] || give_farm_secrets
say "this machine is a $ROLE"
