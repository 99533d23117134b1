"""Batches: files of requests that run as jobs of the class `batch`, in the format of OpenAI's Batch API.

`store` keeps the records of batches in Redis. `lines` reads and checks their input, `results` writes what their lines
return, and `run` takes one batch from validation to its result files. Only the leader (`web.background`) runs batches.
"""
