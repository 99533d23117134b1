"""A job in all its forms: the request, the record, the log, the images, and the store that the API uses."""
