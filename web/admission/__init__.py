"""From a validated request to a durable job: model choice, images, token counts and enqueueing."""
