"""The durable queue: the connection to Redis, the Lua scripts that change state, and the Python sides of them."""
