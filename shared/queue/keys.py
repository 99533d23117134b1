"""Every Redis key, its type, its lifetime, and who writes it.

Most keys are a prefix and an id. The scripts in `shared/queue/scripts` get the prefixes as the Lua table `K`, so each
name is defined only here.

| key | type | holds | lives |
| --- | --- | --- | --- |
| `JOB` + job | hash | a job (`shared.jobs.record.Job`) without prompt and answer | retention after its end |
| `REQUEST` + job | hash | `request` (JSON), `tokens` (packed), `shared` | until the end; if it failed, a while |
| `OUTPUT` + job | string | the text so far | as the record |
| `LOG` + job | stream | its log; entry `n-0` is event n | log retention after the end |
| `LIVE` + job | channel | live copies of the log's entries | – |
| `DONE` + job | channel | the status, once, when the job ends | – |
| `QUEUE` + model | zset | jobs that wait, the reserved ones too; score = class, then fair turn | while jobs wait |
| `TURNS` + model | hash | fair queueing: turn reached by the class and by each owner in it | while jobs wait |
| `WAKE` + model | string | a wake-up is under way | 1 s, or until a claim |
| `SPEED` + model | hash | `mean_s`, moving average of a job's running time | forever, one a model |
| `OWNER` + key id | zset | the jobs of an API key by creation time | as its longest-lived job |
| `IDEM` + key id + `:` + key | string | job id of an Idempotency-Key | as the record |
| `IMAGES` + job | hash | its images, by digest (`shared.jobs.images`) | until it ends; unaccepted 2 min |
| `TIMERS` | zset | job → moment it expires | until it ends |
| `FAILED` | zset | `job bytes` of failed jobs whose requests are kept → moment they expire | retention, or its bound |
| `BYTES` | hash | bytes of jobs: `total`, `growth`, `owner:` + key id; `failed`; `failed_limit` | the limit stays |
| `MEMORY` | hash | `used`, `max`, `system`: Redis's memory at the last pass of the reaper | forever |
| `LEASES` | zset | worker → moment its lease lapses | until it lapses |
| `EXTENSIONS` | hash | worker → seconds that its lease is extended by once after an outage | until it lapses |
| `PASSED` | hash | `at`, `server`: when the reaper last passed, and on which Redis (its run_id) | forever |
| `PREFIXES` + model | hash | 4 digits of a prefix hash → its rest, its workers (`web.admission`) | an hour unused |
| `ROUTED` | hash | `model:preferred`, `:deferred`, `:another` → jobs that affinity routed so | forever, three a model |
| `RUNNING` + worker | set | jobs in the worker's batch | until they end or the lease lapses |
| `RESERVED` + worker | set | jobs the worker has claimed and not admitted yet | the same |
| `WORKER` + worker | string | JSON of `shared.models.registry.WorkerInfo` | a few leases |
| `WORKERS` | zset | worker → its last heartbeat: the cards there may be | pruned when read |
| `HOST` + node | string | JSON of `shared.models.registry.HostInfo`: a worker process | a few leases |
| `HOSTS` | zset | node → its last heartbeat | pruned when read |
| `OPERATION` + id | hash | a loading or unloading of a model (`shared.models.operations`) | a day |
| `OPERATIONS` | zset | operation → when it was asked for | a day |
| `DEMAND` + model | string | operation that loads a model for waiting jobs, once it has begun | half a minute |
| `MODELS` | hash | model → JSON of `shared.models.registry.ModelCard` | forever, one a model |
| `TOKENIZER` + digest | string | tokenizer.json of a model with gzip, for the API | while a model's card names it |
| `ENDED` | hash | `model:status` → jobs that ended so | forever, four a model |
| `ENDS` | list | JSON of jobs that ended without their worker, for task events | until an API process reads it |
| `OLD_QUEUE` + model | zset | the queue of the first layout; old processes write it during an upgrade | until adopted |

`PREFIXES` is written by claims while there are several workers. It has at most 65,536 fields: a hash replaces an
earlier one with the same first four digits.

Celery keeps its own keys in the same database (`_kombu.*`, channels of its remote control), Flask-Limiter `LIMITS:*`.
"""

from typing import Final

JOB: Final = "mlxq:job:"
REQUEST: Final = "mlxq:request:"
OUTPUT: Final = "mlxq:output:"
LOG: Final = "mlxq:log:"
LIVE: Final = "mlxq:live:"
DONE: Final = "mlxq:done:"
QUEUE: Final = "mlxq:waiting:"
TURNS: Final = "mlxq:turns:"
WAKE: Final = "mlxq:wake:"
SPEED: Final = "mlxq:speed:"
OWNER: Final = "mlxq:owner:"
IDEM: Final = "mlxq:idem:"
IMAGES: Final = "mlxq:images:"
TIMERS: Final = "mlxq:timers"
FAILED: Final = "mlxq:failed"
BYTES: Final = "mlxq:bytes"
MEMORY: Final = "mlxq:memory"
LEASES: Final = "mlxq:leases"
EXTENSIONS: Final = "mlxq:grace"
PASSED: Final = "mlxq:passed"
PREFIXES: Final = "mlxq:prefixes:"
ROUTED: Final = "mlxq:routed"
RUNNING: Final = "mlxq:running:"
RESERVED: Final = "mlxq:reserved:"
WORKER: Final = "mlxq:worker:"
WORKERS: Final = "mlxq:workers"
HOST: Final = "mlxq:host:"
HOSTS: Final = "mlxq:hosts"
OPERATION: Final = "mlxq:operation:"
OPERATIONS: Final = "mlxq:operations"
DEMAND: Final = "mlxq:demand:"
MODELS: Final = "mlxq:models"
TOKENIZER: Final = "mlxq:tokenizer-gz:"
ENDED: Final = "mlxq:ended"
ENDS: Final = "mlxq:ends"
OLD_QUEUE: Final = "mlxq:queue:"

LUA_TABLE: Final = (
    "local K = {"
    + ", ".join(f"{name} = '{value}'" for name, value in sorted(globals().items()) if name.isupper())
    + "}\n"
)
