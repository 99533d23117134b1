"""Who may call the API, and how often: API keys, authentication and rate limits."""
