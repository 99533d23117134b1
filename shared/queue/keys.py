"""Every Redis key there is, its type, its lifetime, and who writes it.

A key is a prefix and, mostly, an id behind it. The scripts under `shared/queue/scripts` see the same
prefixes as the Lua table `K` (see `shared.queue.redis`), so that a name stands here and nowhere else.

| key | type | holds | lives |
| --- | --- | --- | --- |
| `JOB` + job | hash | the record of a job (`shared.jobs.record.Job`) | retention after the end |
| `LOG` + job | stream | its log; entry `n-0` is event n | log retention after the end |
| `LIVE` + job | channel | live copies of the log's entries | – |
| `QUEUE` + model | zset | jobs that wait; score = class, then fair turn | while jobs wait |
| `CLOCK` + model | hash | fair queueing: turn reached by the class and by each owner in it | while jobs wait |
| `SPEED` + model | hash | `mean_s`, moving average of a job's running time | for ever |
| `OWNER` + key id | zset | the jobs of an API key by creation time | pruned when listed or added to |
| `IDEM` + key id + `:` + key | string | job id of an Idempotency-Key | as the record |
| `IMAGES` + job | hash | its images, by digest (`shared.jobs.images`) | until it ends; unaccepted 2 min |
| `TIMERS` | zset | job → moment it expires | until it ends |
| `LEASES` | zset | worker → moment its lease lapses | until it lapses |
| `GRACE` | hash | worker → seconds its lease gets once more when nobody could renew it | until it lapses |
| `PASSED` | hash | `at`, `server`: when the reaper last passed by, and on which Redis (its run_id) | for ever |
| `ALONE` + model | string | worker that empties itself for a job that must run alone | until one takes such a job |
| `EMPTYING` + worker | string | it does so now: the workers of other models in its process take nothing | 5 s |
| `PREFIXES` + model | hash | a mark's first 4 digits → its rest, its last claimants (`web.marks`) | an hour unused |
| `ROUTED` | hash | `model:keeper`, `:left`, `:another` → jobs that `claim.lua` routed so | for ever |
| `RUNNING` + worker | set | jobs the worker has claimed | until they end or the lease lapses |
| `WORKER` + worker | string | JSON of `shared.models.registry.WorkerInfo` | a few leases |
| `WORKERS` | zset | worker → its last heartbeat: the cards there may be | pruned when read |
| `HOST` + node | string | JSON of `shared.models.registry.HostInfo`: a worker process | a few leases |
| `HOSTS` | zset | node → its last heartbeat | pruned when read |
| `OPERATION` + id | hash | a loading or unloading of a model (`shared.models.operations`) | a day |
| `OPERATIONS` | zset | operation → when it was asked for | a day |
| `DEMAND` + model | string | operation that loads a model for waiting jobs, once it has begun | half a minute |
| `MODELS` | hash | model → JSON of `shared.models.registry.ModelCard` | for ever |
| `TOKENIZER` + digest | string | tokenizer.json of a model, for counting prompt tokens in the API | for ever |
| `ENDED` | hash | `model:status` → jobs that ended so | for ever |
| `RESCUE` + model | string | a ticket rescue is under way | 2 s |

`PREFIXES` is written by claims while there are several workers, and has 65,536 fields at most: what falls on the same
place replaces what was there.

Celery keeps its own keys in the same database (queues `mlxq.<model>` and `mlxq.<model>@<node>`, `_kombu.*`),
Flask-Limiter `LIMITS:*`.
"""

from typing import Final

JOB: Final = "mlxq:job:"
LOG: Final = "mlxq:log:"
LIVE: Final = "mlxq:live:"
QUEUE: Final = "mlxq:queue:"
CLOCK: Final = "mlxq:clock:"
SPEED: Final = "mlxq:speed:"
OWNER: Final = "mlxq:owner:"
IDEM: Final = "mlxq:idem:"
IMAGES: Final = "mlxq:images:"
TIMERS: Final = "mlxq:timers"
LEASES: Final = "mlxq:leases"
GRACE: Final = "mlxq:grace"
PASSED: Final = "mlxq:passed"
ALONE: Final = "mlxq:alone:"
EMPTYING: Final = "mlxq:emptying:"
PREFIXES: Final = "mlxq:prefixes:"
ROUTED: Final = "mlxq:routed"
RUNNING: Final = "mlxq:running:"
WORKER: Final = "mlxq:worker:"
WORKERS: Final = "mlxq:workers"
HOST: Final = "mlxq:host:"
HOSTS: Final = "mlxq:hosts"
OPERATION: Final = "mlxq:operation:"
OPERATIONS: Final = "mlxq:operations"
DEMAND: Final = "mlxq:demand:"
MODELS: Final = "mlxq:models"
TOKENIZER: Final = "mlxq:tokenizer:"
ENDED: Final = "mlxq:ended"
RESCUE: Final = "mlxq:rescue:"

LUA_TABLE: Final = (
    "local K = {"
    + ", ".join(f"{name} = '{value}'" for name, value in sorted(globals().items()) if name.isupper())
    + "}\n"
)
