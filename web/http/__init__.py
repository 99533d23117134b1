"""HTTP concerns that all routes share: request ids, body parsing, error responses, access log and OpenAPI."""
