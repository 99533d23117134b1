"""The HTTP API: Flask under gunicorn and gevent. Nothing in it imports MLX.

How a `POST /v1/jobs` request is served:

1. `http.request_id` assigns a request id, `access.auth` looks up the API key, `access.rate_limits` counts the request.
2. `routes.jobs` reads the body (`http.request`) into a model from `schemas.requests`.
3. `routes.submission` loads the images (`admission.image_loader`) and calls `admission.admit`, which resolves the
   model, counts the prompt's tokens, stores the job in Redis and wakes a worker.
4. `results.job_views` renders the job as JSON. `streaming` delivers its events to any number of readers.

`services` creates the objects that do this, once per process. `http.problems` turns exceptions into error responses.
"""
