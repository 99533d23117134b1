"""Job events for clients: live delivery over pub/sub, replay from the job log, Server-Sent Events and NDJSON."""
