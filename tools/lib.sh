# Shared by ./quickstart, ./run_tests and .ci/run (bash, sourced in the root): packages, messages.

say() { printf '%s\n' "$*" >&2; }

die() {
  say "$(basename "$0"): $*"
  exit 1
}

# Runs a command with its output in a log; shows the log's end when it fails.
quietly() {
  local log=$1
  shift
  mkdir -p "$(dirname "$log")"
  "$@" >"$log" 2>&1 && return
  tail -n 25 "$log" >&2
  die "failed: $*  (whole output: $log)"
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "root or sudo is needed for: $*"
  fi
}

# packages_wanted [test]: the names in tools/apt-packages.txt, with "test" also those that only tests need.
packages_wanted() {
  local rule='/^test:/d'
  [ "${1:-}" != test ] || rule='s/^test://'
  sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -e "$rule" tools/apt-packages.txt
}

# Installs what of the packages dpkg does not have. OFFLINE=1: only says what is missing.
install_packages() {
  local missing=() package
  command -v dpkg-query >/dev/null || return 0 # another distribution: cmake will name what it lacks
  for package in $(packages_wanted "${1:-}"); do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  [ "${OFFLINE:-0}" != 1 ] || die "packages are missing, and --offline forbids fetching: apt-get install ${missing[*]}"
  say "Installing ${#missing[@]} packages: ${missing[*]}"
  quietly build/logs/apt.log as_root apt-get update
  quietly build/logs/apt.log as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "${missing[@]}"
}
