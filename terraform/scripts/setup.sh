# Makes a fresh machine the coordinator or a worker of a drover farm. Lines before this one set:
#   ROLE          coordinator or worker
#   SOURCE_URL    an archive of drover (tar.gz) and
#   SOURCE_SHA256 its hash
#   HEAD          host:port of the Ray head
#   NAME          of a worker; empty: that of the machine
#   OPTIONS       further options of `drover worker`
#   GRACE_S       seconds in which running builds may end
#   TOKEN_SECRET  name of the secret with the Ray token: the coordinator puts it there, workers read it
#   DATABASE      host/name of PostgreSQL, and
#   DATABASE_SECRET  the secret with its user and password (coordinator)
#   FARM_TOML     settings (coordinator)
# It runs once as root, says what it does on standard error, and fails with one sentence. It may be run again.
set -eu

say() { echo "drover set-up: $*" >&2; }
die() { say "$*"; exit 1; }
root=${DROVER_ROOT:-}

need() {
  for name in "$@"; do
    eval "value=\${$name:-}"
    [ -n "$value" ] || die "$name is not set"
  done
}

# Credentials of the machine's role; no secret is in user data, in the state of Terraform or in an argument.
secret() { aws secretsmanager get-secret-value --secret-id "$1" --query SecretString --output text; }

own_address() {
  token=$(curl -fsS -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' http://169.254.169.254/latest/api/token)
  curl -fsS -H "X-aws-ec2-metadata-token: $token" "http://169.254.169.254/latest/meta-data/$1"
}

install_drover() {
  [ ! -x "$root/opt/drover/run" ] || return 0
  archive=$(mktemp)
  curl -fsSL --retry 5 -o "$archive" "$SOURCE_URL" || die "the archive $SOURCE_URL cannot be fetched"
  # macOS has the other one.
  found=$(if command -v sha256sum >/dev/null; then sha256sum "$archive"; else shasum -a 256 "$archive"; fi | cut -d ' ' -f 1)
  [ "$found" = "$SOURCE_SHA256" ] || die "the archive $SOURCE_URL has the hash $found, not $SOURCE_SHA256"
  mkdir -p "$root/opt/drover"
  tar -xzf "$archive" -C "$root/opt/drover" --strip-components=1
  rm -f "$archive"
}

# From standard input, never with a moment in which others can read it.
keep() { (umask 077 && cat >"$1.new" && mv "$1.new" "$1"); }

coordinator() {
  need HEAD TOKEN_SECRET FARM_TOML
  id drover >/dev/null 2>&1 || useradd --system --home-dir /var/lib/drover drover
  printf '%s\n' "$FARM_TOML" >"$etc/farm.toml"
  printf 'HEAD=%s\n' "$HEAD" >"$etc/head.env"
  if [ -n "${DATABASE:-}" ]; then
    need DATABASE_SECRET
    url=$(secret "$DATABASE_SECRET" | python3 -c 'import json, sys, urllib.parse
login = json.load(sys.stdin)
print("postgresql+psycopg://" + ":".join(urllib.parse.quote(login[one], safe="") for one in ("username", "password")), end="")')
    for name in JOURNAL DERIVATIONS CACHE; do
      # systemd takes a percent sign as it is in a file of variables.
      printf 'DROVER_%s_DATABASE_URL=%s@%s\n' "$name" "$url" "$DATABASE"
    done | keep "$etc/coordinator.env"
  fi
  secrets=$root/var/lib/drover/secrets
  mkdir -p "$secrets"
  chmod 700 "$secrets"
  if [ ! -s "$secrets/ray-token" ]; then
    # Where this machine replaces another, the farm has a token already.
    given=$(secret "$TOKEN_SECRET" 2>/dev/null) || given=
    if [ -z "$given" ]; then
      given=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
      printf '%s' "$given" | aws secretsmanager put-secret-value --secret-id "$TOKEN_SECRET" --secret-string file:///dev/stdin >/dev/null
    fi
    printf '%s' "$given" | keep "$secrets/ray-token"
  fi
  chown -R drover:drover "$secrets"
  units="drover-head drover-coordinator"
}

worker() {
  need HEAD TOKEN_SECRET GRACE_S
  tries=60
  # The coordinator may start at the same time as this machine.
  until secret "$TOKEN_SECRET" 2>/dev/null | keep "$etc/ray-token" && [ -s "$etc/ray-token" ]; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || die "the secret $TOKEN_SECRET has no value after ten minutes; does the coordinator run?"
    sleep "${RETRY_S:-10}"
  done
  chmod 400 "$etc/ray-token"
  {
    printf 'HEAD=%s\n' "$HEAD"
    printf 'ADDRESS=%s\n' "$(own_address local-ipv4)"
    printf 'NAME=%s\n' "${NAME:-$(own_address instance-id)}"
    printf 'WORKER_OPTIONS="%s"\n' "${OPTIONS:-}"
    printf 'DROVER_STOP_GRACE_S=%s\n' "$GRACE_S"
  } >"$etc/worker.env"
  units=drover-worker
  [ "${WATCH:-}" != yes ] || units="drover-worker drover-drain"
}

[ "$(id -u)" -eq 0 ] || die "this wants root"
need ROLE SOURCE_URL SOURCE_SHA256
etc=$root/etc/drover
mkdir -p "$etc"
case "$(uname -s)" in
  Linux)
    if ! command -v aws >/dev/null || ! command -v curl >/dev/null; then
      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends awscli ca-certificates curl python3 >&2
    fi ;;
  Darwin)
    command -v nix-store >/dev/null || [ -x /nix/var/nix/profiles/default/bin/nix-store ] || die "this image has no Nix: name one that has (README, Macs)" ;;
esac
install_drover
(cd "$root/opt/drover" && ./run setup) || die "drover could not set itself up; see the messages above"
case "$ROLE" in
  coordinator) coordinator ;;
  worker) worker ;;
  *) die "ROLE is $ROLE, neither coordinator nor worker" ;;
esac
if [ "$(uname -s)" = Darwin ]; then
  cp "$root/opt/drover/infra/deploy/launchd/org.drover.worker.plist" "$root/Library/LaunchDaemons/"
  launchctl bootstrap system "$root/Library/LaunchDaemons/org.drover.worker.plist"
else
  mkdir -p "$root/etc/systemd/system"
  for unit in $units; do
    cp "$root/opt/drover/infra/deploy/systemd/$unit.service" "$root/etc/systemd/system/"
  done
  systemctl daemon-reload
  for unit in $units; do systemctl enable --now "$unit"; done
fi
say "this machine is a $ROLE"
