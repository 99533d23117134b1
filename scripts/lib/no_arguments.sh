# Sourced by scripts without arguments: with an argument, it prints the script's first comment.
if [ $# -gt 0 ]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  case $1 in
    -h | --help) exit 0 ;;
    *) echo "$(basename "$0"): takes no arguments, got: $*" >&2 && exit 2 ;;
  esac
fi
