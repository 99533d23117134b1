"""A worker's side of the queue: the lease, claims, the publisher, and Celery's wake-ups."""
