#!/usr/bin/env bash
# Builds one image that replaces the public Python and Redis images, on a Debian machine that can reach Debian's packages
# but no image registry. Needs root, docker and debootstrap; takes a minute.
# usage: eval "$(tests/compose/standin_images.sh)" && scripts/test-compose
#   CA_BUNDLE  file with CA certificates for downloads inside the image (default: Debian's)
#   PIP_CONF   pip configuration file for the image
#   SUITE      Debian release (bookworm)
set -euo pipefail
NAME=mlxq-standin
SUITE=${SUITE:-bookworm}

rootfs=$(mktemp -d)
trap 'rm -rf "$rootfs"' EXIT
{
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,redis-server "$SUITE" "$rootfs"
  # As in the public Redis images: uid 999 owns /data.
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
