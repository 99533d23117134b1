"""The background process: `python -m web.background`. It feeds batches, delivers webhooks and stores responses.

Any number of these processes may run, on any number of hosts; one of them leads. If the leader dies, another one
continues within seconds from what is in Redis and on disk.
"""
