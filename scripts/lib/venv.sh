# Sourced by the scripts: ARGUMENTS="$*"; . "$(dirname "$0")/lib/venv.sh" SET…
# Installs the requirement sets (requirements/SET.txt) in .venv and puts it first on PATH. This takes milliseconds if the
# pins have not changed. The current directory is kept, because arguments may be relative paths.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
VENV=$ROOT/.venv
# Only this folder: a `web` or `secrets.py` in the user's PYTHONPATH must not be imported instead.
export PYTHONPATH=$ROOT
export PATH=$VENV/bin:$PATH

venv_fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# .venv/pins has a copy of each installed pin file; a set that differs from its copy must be installed.
venv_is_current() {
  local name
  if cmp -s "$ROOT/requirements/dev.txt" "$VENV/pins/dev.txt"; then set -- dev; fi # it includes all the others
  for name in "$@"; do cmp -s "$ROOT/requirements/$name.txt" "$VENV/pins/$name.txt" || return 1; done
  "$VENV/bin/python" -c '' 2>/dev/null # a venv breaks if its Python is removed
}

venv_find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  venv_fail "needs Python 3.11 to 3.14, which is not on PATH"
}

venv_create() {
  local python
  python=$(venv_find_python) || exit 1
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    venv_fail "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"
  "$python" -m venv --clear "$VENV" || venv_fail "could not create $VENV"
  mkdir "$VENV/pins" # last: its existence shows that the venv is complete
}

# Locks the folder through file descriptor 9; the kernel releases it when this shell and pip have exited.
venv_lock() {
  local python
  python=$(venv_find_python) || exit 1
  mkdir -p "$VENV" 2>/dev/null || venv_fail "cannot write to $ROOT"
  exec 9<"$VENV"
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
  echo "another script is installing requirements; waiting for it" >&2
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
}

# On a terminal, one line that counts packages instead of hundreds of lines from pip.
venv_progress() { # PID LOG TOTAL
  [ -t 2 ] || return 0
  while kill -0 "$1" 2>/dev/null; do
    printf '\r\033[K  %s of %s  %s' "$(grep -c '^Collecting' "$2")" "$3" \
      "$(grep -E '^(Collecting|Installing collected)' "$2" | tail -n 1 | cut -d '(' -f 1 | cut -c 1-60)" >&2
    sleep 0.3
  done
  printf '\r\033[K' >&2
}

# The pins are complete, hence --no-deps: with hashes, pip would reject names with extras as unpinned.
venv_install() {
  local name log=$VENV/install.log pip total
  local files=() arguments=()
  for name in "$@"; do
    files+=("$ROOT/requirements/$name.txt")
    arguments+=(--requirement "$ROOT/requirements/$name.txt")
  done
  total=$(grep -hoE '^[a-z0-9][^ ]*==' "${files[@]}" | sort -u | wc -l | tr -d ' ')
  echo "installing requirements ($*): $total packages, a few minutes the first time" >&2
  "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps --require-hashes "${arguments[@]}" \
    >"$log" 2>&1 &
  pip=$!
  trap 'kill "$pip" 2>/dev/null; exit 130' INT TERM HUP
  venv_progress "$pip" "$log" "$total"
  wait "$pip" || venv_explain "$log"
  trap - INT TERM HUP
  for name in "$@"; do cp "$ROOT/requirements/$name.txt" "$VENV/pins/$name.txt"; done
}

venv_explain() { # LOG
  local reason
  reason=$(grep '^ERROR' "$1" | tail -n 1)
  if grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|Network is unreachable' "$1"; then
    reason="the package index cannot be reached"
  fi
  venv_fail "could not install requirements: ${reason:-pip failed} (see $1)"
}

# --help installs nothing; before the first start it prints the script's first comment.
venv_help() {
  case " ${ARGUMENTS:-} " in
    *" -h "* | *" --help "*) ;;
    *) return 0 ;;
  esac
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  echo "The list of options needs the packages that the first start installs."
  exit 0
}

venv_ensure() {
  venv_is_current "$@" && return
  venv_help
  venv_lock
  if ! venv_is_current "$@"; then
    if [ ! -d "$VENV/pins" ] || ! "$VENV/bin/python" -c '' 2>/dev/null; then venv_create; fi
    venv_install "$@"
  fi
  exec 9>&-
}

# Becomes `main()` of a module. SIGINT is ignored until scripts/lib/run.py has replaced Python's handler, which would
# print a traceback. If it was ignored before, as in background jobs of shell scripts, Python leaves it ignored.
run_main() { # MODULE ARGUMENTS…
  if [ -n "$(trap -p INT)" ]; then exec python -P -m "$@"; fi
  trap '' INT
  exec python -P -m scripts.lib.run "$@"
}

venv_ensure "$@"
