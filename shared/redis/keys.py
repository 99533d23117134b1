"""Every Redis key: type, content, lifetime.

Most keys consist of a prefix and an id. The scripts in `shared/queue/scripts` receive the prefixes as the Lua table
`K`, so each name is defined only here. "Job end" in the last column means that the key is deleted when the job ends.

| key | type | content | lifetime |
| --- | --- | --- | --- |
| `JOB` + job | hash | the record (`shared.jobs.record.Job`), without prompt and answer | retention after job end |
| `REQUEST` + job | hash | `request` (JSON), `tokens` (packed), `shared` | job end; if it is kept, see `FAILED` |
| `OUTPUT` + job | string | the generated text so far | as the record |
| `LOG` + job | stream | the job's log (`shared.jobs.log`); entry `n-0` is event n | log retention after job end |
| `LIVE` + job | channel | a copy of each log entry when it is written, unless it is large | – |
| `DONE` + job | channel | the final status, once, when the job ends | – |
| `QUEUE` + model | zset | queued jobs, reserved ones included; score = class, then turn | until empty |
| `TURNS` + model | hash | fair queueing: turns of classes and of owners in them; `passed:` + class | as `QUEUE` |
| `QUEUED` + model | hash | number of queued jobs by owner; `counted_at`: time of the last recount | as `QUEUE` |
| `WAKE` + model | string | set while a wake-up is in flight | 1 s, or until the next claim |
| `USAGE` + key id + `:` + day | hash | model → counters of jobs and tokens (`lib/usage.lua`) | 400 days |
| `CHARGES` + key id | hash | tokens of a key that has a token limit (`lib/usage.lua`) | 8 days |
| `MAX_RUNNING` | hash | key id → maximum of running jobs, for keys that have one | forever |
| `PARKED` + model + `:` + key id | zset | queued jobs of a key at its limit of running jobs | until empty |
| `PARKED_COUNTS` | hash | model + space + key id → number of parked jobs | until empty |
| `SPEED` + model | hash | `mean_s`: average running time in seconds; rate of starts by class | forever, one per model |
| `OWNER` + key id | zset | job → creation time, for all jobs of an API key | as its longest-lived job |
| `IDEM` + key id + `:` + key | string | job id for an Idempotency-Key | as the record |
| `IMAGES` + job | hash | image digest → file (`shared.jobs.images`) | as `REQUEST`; 2 min if never accepted |
| `TIMERS` | zset | job → time at which it expires | job end |
| `FAILED` | zset | `job bytes` of ended jobs → expiry of their kept requests | retention, or until over the limit |
| `BYTES` | hash | bytes of jobs: `total`, `growth`, `owner:` + key id, `failed`, `unarchived`; 3 settings | forever |
| `MEMORY` | hash | `used`, `max`, `system`: Redis's memory in bytes at the reaper's last pass | forever |
| `LEASES` | zset | worker → time at which its lease expires | until the lease expires |
| `EXTENSIONS` | hash | worker → seconds that its lease may be extended after an outage | as the lease |
| `PASSED` | hash | time (`at`) and Redis run id (`server`) of the reaper's last pass | forever |
| `PREFIXES` + model | hash | first 4 digits of a prefix hash → its other digits, workers | 1 h after the last claim |
| `ROUTED` | hash | `model:preferred`, `…:deferred`, `…:another` → number of jobs | forever, 3 fields per model |
| `RUNNING` + worker | set | jobs in the worker's batch | until they end or the lease expires |
| `RESERVED` + worker | set | jobs that the worker has claimed but not admitted to its batch | as `RUNNING` |
| `WORKER` + worker | string | JSON of `shared.models.registry.WorkerInfo` | a few lease lifetimes |
| `WORKERS` | zset | worker → last heartbeat; the index of `WORKER` | entries are pruned when read |
| `HOST` + node | string | JSON of `shared.models.registry.HostInfo`: one worker process | a few lease lifetimes |
| `HOSTS` | zset | node → last heartbeat; the index of `HOST` | entries are pruned when read |
| `OPERATION` + id | hash | a load, unload or download of a model (`shared.models.operations`) | 1 day |
| `OPERATIONS` | zset | operation → creation time | entries are pruned after 1 day |
| `DEMAND` + model | string | operation that loads a model for queued jobs; empty until it starts | half a minute |
| `LOAD_FAILURE` + model | string | JSON of `shared.models.operations.LoadFailure` | 10 min |
| `SERVABLE` | zset | model → time at which a process that could serve it was last seen | forever, one entry per model |
| `MODELS` | hash | model → JSON of `shared.models.registry.ModelCard` | forever, one field per model |
| `ADDED_MODELS` | hash | model → JSON of `shared.models.additions.AddedModel` | forever, one field each |
| `ALIASES` | hash | alias → model, of those that were added while the service runs | forever |
| `TOKENIZER` + digest | string | a model's tokenizer.json, gzipped, for the API | until no model card names it |
| `ENDED` | hash | `model:status` → number of jobs | forever, 4 fields per model |
| `ATTEMPTS` | hash | `model:outcome` → number of attempts that ended | forever, 3 fields per model |
| `TOKENS` | hash | key id + `:input` or `:output` → tokens of ended jobs | forever, 2 fields per API key |
| `SHOWN_KEYS` | zset | API key → when its tokens got a series of their own among the metrics | forever, about 50 |
| `ENDS` | list | JSON of jobs that ended without their worker, for task events | until an API process reads it |
| `LEADER` | string | token of the background process that leads | a few seconds |
| `UNARCHIVED` | zset | `job bytes` of ended jobs that are not archived yet → time of their end | until archived |
| `ERASED` | zset | deleted job → time; its row in the archive must be erased | a minute after it was erased |
| `ARCHIVE` | hash | `web.cluster.archive_state.ArchiveState` | forever |
| `PURGES` | zset | key id → time at which erasing everything of a revoked key was requested | until done |
| `PREFIX_CUTOFFS` | zset | key id → time; workers erase the key's prefixes not used since; `inf`: all | forever |
| `BATCH` + batch | hash | a batch (`web.batches.store`); its lines are on disk | file retention after its end |
| `BATCHES` + key id | zset | batch → creation time, for all batches of an API key | entries are pruned |
| `UNFINISHED_BATCHES` | zset | unfinished batch → creation time; with `:` + key id: those of an API key | until empty |
| `BATCH_COUNTS` | hash | numbers: `lines_completed`, `lines_failed`; status → batches that ended with it | forever |
| `RESPONSE` + key id + `:` + response | hash | `request` and `answer`, if not on disk | response retention |
| `RESPONSES` + key id | zset | response → time of its last use, of those in Redis | as its last response |
| `UNANSWERED` | zset | `key id response` whose answer is not yet stored → creation time | until stored |
| `WEBHOOK_ENDPOINTS` | hash | endpoint → JSON of `web.webhooks.receivers.Endpoint` | until removed |
| `WEBHOOK_SECRETS` | hash | key id → JSON of the secrets for the URLs of its jobs | forever, one per key that has one |
| `WEBHOOK_OUTBOX` | list | JSON of events that are not yet deliveries | until a background process takes them |
| `WEBHOOK_COUNTS` | hash | numbers of events, `dropped` events, and attempts: `delivered`, `failed`, `dead` | forever |
| `WEBHOOK` + delivery | hash | a delivery (`web.webhooks.deliveries`) | 1 day after delivery, 30 days after failure |
| `WEBHOOKS_DUE` | zset | pending delivery → time of its next attempt | until empty |
| `WEBHOOKS_DEAD` | zset | delivery that failed for good → time of its end | entries are pruned after 30 days |
| `SESSION` + hash of its token | string | id of the API key that signed in to the console | 12 h |
| `SAMPLES` | list | JSON of `web.cluster.samples.Sample`, oldest first: the last hour | forever, 120 entries |
| `OLD_TOKENIZER` + digest | string | tokenizer of an earlier version, not gzipped | until no model card names it |
| `OLD_QUEUE` + model | zset | queue of the first layout; old processes write it during an upgrade | until adopted |

`PREFIXES` is a direct-mapped table of at most 65,536 fields per model: a hash replaces an earlier one with the same
first four digits. Only claims write it, and only while there are several workers. `web.admission` computes the hashes.

Fields of `JOB` that mainly the scripts read:

| field | content |
| --- | --- |
| `bytes`, `request_bytes`, `growth_bytes` | bytes counted in `BYTES`: the sum, the request, the expected growth |
| `size` | tokens of worker memory that the job is expected to need at first |
| `prefixes`, `deferred_at` | hashes of the prompt's prefixes; time of the first deferral to a preferred worker |
| `spare`, `moves` | set while the job is reserved as a spare; how often another worker has taken it over |
| `admitted_at`, `admitted_seq` | start of the current attempt: its time and the number of its first event |
| `stop_as` | `cancelled` or `expired` when a running job must stop |
| `end_by` | the deadline |
| `fingerprint` | hash of the request, if it can be repeated: see `shared.jobs.readers` |
| `reader`, `kept_until` | the API process that reads the job, and until when its lost client can come back |
| `charged` | tokens that the job is expected to use, if its API key has a token limit |
| `repeats_prompt` | set if the job is a further choice of a request: its prompt does not count as usage again |
| `children` | ids of the jobs with the further choices of the same request |
| `response` | set if a background response waits for the job, so that its end is an event for webhooks |
| `webhook` | JSON of the URL and events of the job's webhooks; `-` if it has none at all |
| `traceparent`, `tracestate` | W3C trace context of the HTTP request, if it is traced |
| `deleted` | set when the API key deleted the job; the record, text and log then stay for 10 s |
| `suspicion`, `patience`, `cohort`, `deaths` | see `shared/queue/scripts/lib/suspicion.lua` |

Celery keeps its own keys in the same database: `_kombu.*` with a few queue names per process, and queues that contain
`celery`. A process that is killed while it asks the workers something leaves up to four names of 120 bytes; kombu
deletes them an hour after no process has asked. Flask-Limiter counts in `LIMITS:*`; its keys expire.
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
QUEUED: Final = "mlxq:queued:"
MAX_RUNNING: Final = "mlxq:max-running"
PARKED: Final = "mlxq:parked:"
PARKED_COUNTS: Final = "mlxq:parked-counts"
USAGE: Final = "mlxq:usage:"
CHARGES: Final = "mlxq:charges:"
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
LOAD_FAILURE: Final = "mlxq:load-failure:"
SERVABLE: Final = "mlxq:servable"
DEMAND: Final = "mlxq:demand:"
MODELS: Final = "mlxq:models"
ADDED_MODELS: Final = "mlxq:models-added"
ALIASES: Final = "mlxq:models-aliases"
TOKENIZER: Final = "mlxq:tokenizer-gz:"
ENDED: Final = "mlxq:ended"
ATTEMPTS: Final = "mlxq:attempts"
TOKENS: Final = "mlxq:tokens"
SHOWN_KEYS: Final = "mlxq:tokens-shown"
ENDS: Final = "mlxq:ends"
LEADER: Final = "mlxq:leader"
UNARCHIVED: Final = "mlxq:unarchived"
ERASED: Final = "mlxq:erased"
ARCHIVE: Final = "mlxq:archive"
PURGES: Final = "mlxq:purges"
PREFIX_CUTOFFS: Final = "mlxq:prefix-cutoffs"
BATCH: Final = "mlxq:batch:"
BATCHES: Final = "mlxq:batches:"
UNFINISHED_BATCHES: Final = "mlxq:unfinished-batches"
BATCH_COUNTS: Final = "mlxq:batch-counts"
RESPONSE: Final = "mlxq:response:"
RESPONSES: Final = "mlxq:responses:"
UNANSWERED: Final = "mlxq:unanswered"
WEBHOOK_ENDPOINTS: Final = "mlxq:webhook-endpoints"
WEBHOOK_SECRETS: Final = "mlxq:webhook-secrets"
WEBHOOK_OUTBOX: Final = "mlxq:webhook-outbox"
WEBHOOK_COUNTS: Final = "mlxq:webhook-counts"
WEBHOOK: Final = "mlxq:webhook:"
WEBHOOKS_DUE: Final = "mlxq:webhooks-due"
WEBHOOKS_DEAD: Final = "mlxq:webhooks-dead"
SESSION: Final = "mlxq:session:"
SAMPLES: Final = "mlxq:samples"
OLD_QUEUE: Final = "mlxq:queue:"
OLD_TOKENIZER: Final = "mlxq:tokenizer:"

LUA_TABLE: Final = (
    "local K = {"
    + ", ".join(f"{name} = '{value}'" for name, value in sorted(globals().items()) if name.isupper())
    + "}\n"
)
"""Lua source that defines the table `K` of all keys above."""
