"""Webhooks: events of jobs and batches, sent over HTTP and signed as the Standard Webhooks specification says.

The script that ends a job or a batch records the event in the same call. The leader (`web.background`) turns each event
into a delivery per receiver, and sends it until the receiver confirms it or all attempts have failed. `receivers` keeps
URLs and secrets, `signing` signs, `deliveries` is the queue in Redis, and `sender` makes the requests.
"""
