# Sourced by scripts that take none: with an argument, says what the script is for, in its own first comment.
if [ $# -gt 0 ]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  case $1 in
    -h | --help) exit 0 ;;
    *) echo "$(basename "$0"): takes no arguments, given: $*" >&2 && exit 2 ;;
  esac
fi
