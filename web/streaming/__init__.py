"""Job events for clients: live delivery over pub/sub, replay from the job log."""
