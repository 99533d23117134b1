# Two images with a common base: `web` (the API, and Flower with another command) and `worker`.
# They contain only code and pinned packages; settings come from the environment, and models are mounted.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
# One user with a fixed id, so that volumes keep their owner after a rebuild. It can write only to /data.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /tmp mlxq \
    && install --directory --owner=mlxq --group=mlxq --mode=700 /data \
    && python3 -m venv /opt/venv
WORKDIR /app

FROM base AS web
COPY requirements/web.txt requirements/
RUN pip install --no-cache-dir --disable-pip-version-check --only-binary=:all: --no-deps --require-hashes -r requirements/web.txt
COPY shared shared
COPY web web
COPY scripts/stack scripts/stack
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
COPY requirements/worker.txt requirements/
RUN pip install --no-cache-dir --disable-pip-version-check --only-binary=:all: --no-deps --require-hashes -r requirements/worker.txt
COPY shared shared
COPY worker worker
COPY scripts/stack/container_health.py scripts/stack/
RUN python -m compileall -q .
USER mlxq
CMD ["python", "-m", "worker.process.launcher"]
