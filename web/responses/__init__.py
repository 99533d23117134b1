"""OpenAI's Responses API as a thin layer over jobs.

`requests` and `items` are what comes in. `conversation` and `translate` turn it into the request of a job. `output`
and `events` turn the job's log into output items and numbered events, and `view` describes the response.
"""
