"""The durable queue: the Lua scripts that change state, the Python sides of them, and wake-ups through Celery."""
