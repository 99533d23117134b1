"""Jobs as JSON responses: job views, token log-probabilities and parsed UI-TARS actions."""
