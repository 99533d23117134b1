"""Workers and models as the API sees them: a snapshot of their state, health checks, loading and unloading."""
