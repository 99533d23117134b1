"""Jobs as JSON responses: job views and token log-probabilities."""
