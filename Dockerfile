# Two images on one base: `web` (the API, and Flower with another command) and `worker` (the model).
# They hold code and pinned packages only: settings come from the environment, models are mounted.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
# One user for both, with a fixed id, so that volumes keep their owner across rebuilds; only /data is theirs.
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
# The file system is read-only at run time: what is not compiled now is compiled at every start.
RUN python -m compileall -q .
USER mlxq
EXPOSE 8080
CMD ["python", "-m", "web"]

FROM base AS worker
# MLX's Linux wheel links the reference BLAS; the worker puts this one in front of it.
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
