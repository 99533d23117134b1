"""The connection to Redis: URLs, clients, key names, and checks of what the service needs from the server."""
