#!/usr/bin/env bash
# Makes one image that stands in for the public base images (Python's and Redis's), on a Debian machine that reaches
# Debian's packages but no image registry. Needs root, docker and debootstrap; takes a minute.
# usage: eval "$(tests/compose/standin_images.sh)" && scripts/test-compose
#   CA_BUNDLE  file of CA certificates that downloads inside the image shall trust, if Debian's do not suffice
#   PIP_CONF   pip configuration for inside the image
#   SUITE      Debian release to take (bookworm)
set -euo pipefail
NAME=mlxq-standin
SUITE=${SUITE:-bookworm}

rootfs=$(mktemp -d)
trap 'rm -rf "$rootfs"' EXIT
{
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,redis-server "$SUITE" "$rootfs"
  # As the public Redis images have it: uid 999, and /data is theirs.
  install -d -o 999 "$rootfs/data"
  if [ -n "${CA_BUNDLE:-}" ]; then
    cp "$CA_BUNDLE" "$rootfs/etc/ssl/certs/ca-certificates.crt"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$rootfs/etc/pip.conf"
  fi
  if [ -n "${PIP_CONF:-}" ]; then cp "$PIP_CONF" "$rootfs/etc/pip.conf"; fi
  rm -rf "$rootfs"/var/cache/apt/archives/*.deb
  tar -C "$rootfs" -c . | docker import - "$NAME"
} >&2
echo "export PYTHON_IMAGE=$NAME REDIS_IMAGE=$NAME"
