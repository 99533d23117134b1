"""pydantic models of request and response bodies. The OpenAPI document is generated from them."""
