-- uses: limits
-- Accepts one or several jobs, all or none: writes records, requests, places in the queue and first events. A repeated call
-- returns the same jobs.
-- ARGV[1]: a JSON object with
--   owner, model, class, retention_s, idempotency_key or '', fingerprint, start_within_s, deadline_s
--   images_slack_s   seconds that stored images outlive the jobs' deadline
--   max_queue        maximum number of queued jobs of the model; 0: unlimited
--   weight           share of the owner's jobs relative to those of other owners
--   owner_queue      maximum number of the owner's queued jobs of the model
--   max_running      maximum number of the owner's running jobs; 0: unlimited
--   tokens_per_minute, tokens_per_day
--                    limits of the owner's tokens; 0: unlimited
--   queue_bytes      maximum bytes of all unfinished jobs; 0: half of Redis's maxmemory or, if it has none, an eighth of
--                    the memory of its machine
--   owner_bytes      maximum bytes of the owner's unfinished jobs; 0: a quarter of queue_bytes
--   memory_share     share of maxmemory that used memory and expected growth may reach together
--   jobs             for each job:
--     id
--     images         number of images stored for it
--     request_bytes  bytes that it occupies now
--     growth_bytes   bytes that its log and its text may add
--     shared         length of the shared prefix in its tokens
--     tokens         number of tokens that it is expected to use
--     record         record fields as name, value, …
-- ARGV[2..]: for each job its request as JSON, and its packed token ids or ''
-- Returns {'created' or 'exists', 1 if the model's workers must be woken else 0, place of the first job (see `queue_place`),
--   what is left of the token limits (see `tokens_left`) or '', its record as name, value, …}, or why the jobs were
--   rejected, with the seconds to wait or '' and what is left: {'reused', ''} (Idempotency-Key with another fingerprint), {'full', …},
--   {'too large', …}, {'owner queue full', …}, {'owner full', …}, {'tokens per minute', …}, {'tokens per day', …},
--   {'bytes full', …}, {'memory full', …} or {'images', …} (images are missing)
--
-- Invariants: a rejected call writes nothing, except that the owners' jobs may be counted anew. An accepted call and a
-- repeated one both write something, because the durability check that follows covers only writes of the same connection.
-- The first write needs memory: Redis checks only up to the first write whether it has memory left.
local request = cjson.decode(ARGV[1])
local owner, model, class, jobs = request.owner, request.model, request.class, request.jobs
local at = now()
local bytes, expected_tokens = 0, 0 -- of all jobs
for _, job in ipairs(jobs) do
  job.bytes = job.request_bytes + job.growth_bytes
  bytes = bytes + job.bytes
  expected_tokens = expected_tokens + job.tokens
end
local limits = read_limits(request, at)

-- Returns the first of the jobs that an earlier call created. As its write, it sets the expiry that the record has anyway,
-- because that needs no memory.
local function exists(existing)
  local key = K.JOB .. existing
  local ttl_ms = redis.call('PTTL', key)
  redis.call('PEXPIRE', key, ttl_ms < 0 and '1000000000' or math.max(ttl_ms, 1))
  if ttl_ms < 0 then
    redis.call('PERSIST', key)
  end
  local of, by, at_class = unpack(redis.call('HMGET', key, 'model', 'owner', 'class'))
  return {'exists', 0, queue_place(existing, of, by, at_class), '', unpack(redis.call('HGETALL', key))}
end

local RECOUNT_S = 10

-- Whether the owner would have more queued jobs of the model than it may have. Counts them anew before it says so, but not
-- often.
local function owner_queue_full()
  local key = K.QUEUED .. model
  local max = request.owner_queue - #jobs
  local count, counted_at = unpack(redis.call('HMGET', key, owner, 'counted_at'))
  local missing = not counted_at and redis.call('EXISTS', K.QUEUE .. model) == 1
  local full = tonumber(count or '0') > max
  if missing or (full and now() - tonumber(counted_at or '0') >= RECOUNT_S) then
    recount_queue(model)
    full = tonumber(redis.call('HGET', key, owner) or '0') > max
  end
  return full
end

-- Returns which limit the jobs exceed together, and the seconds to wait; nil if they exceed none.
local function exceeded_limit()
  if owner_queue_full() then
    return 'owner queue full', seconds_per_start(model, class, owner)
  elseif request.max_queue > 0 and queue_length(model) + #jobs > request.max_queue then
    return 'full', seconds_per_start(model, class)
  end
  local exceeded, wait_s = exceeded_tokens(limits, expected_tokens)
  if exceeded then
    return exceeded, wait_s
  end
  local total, owned, growth = unpack(redis.call('HMGET', K.BYTES, 'total', 'owner:' .. owner, 'growth'))
  local used, max, system = unpack(redis.call('HMGET', K.MEMORY, 'used', 'max', 'system'))
  total, owned, used, max = tonumber(total or '0'), tonumber(owned or '0'), tonumber(used or '0'), tonumber(max or '0')
  local default = (max > 0 and max or tonumber(system or '0') / 4) / 2
  local queue_bytes = request.queue_bytes > 0 and request.queue_bytes or default
  local owner_bytes = request.owner_bytes > 0 and request.owner_bytes or queue_bytes / 4
  if owner_bytes > 0 and bytes > owner_bytes then
    return 'too large'
  elseif owner_bytes > 0 and owned + bytes > owner_bytes then
    return 'owner full', seconds_per_start(model, class, owner)
  elseif queue_bytes > 0 and total + bytes > queue_bytes then
    return 'bytes full', seconds_per_start(model, class)
  elseif max > 0 and used + tonumber(growth or '0') + bytes > request.memory_share * max then
    return 'memory full', seconds_per_start(model, class)
  end
end

if request.idempotency_key ~= '' then
  local first = redis.call('GET', K.IDEM .. owner .. ':' .. request.idempotency_key)
  local fingerprint = first and redis.call('HGET', K.JOB .. first, 'fingerprint')
  if fingerprint then
    return fingerprint == request.fingerprint and exists(first) or {'reused', ''}
  end
end
if redis.call('EXISTS', K.JOB .. jobs[1].id) == 1 then
  return exists(jobs[1].id)
end
local limit, wait_s = exceeded_limit()
if limit then
  return {limit, wait_s and stamp(wait_s) or '', limits and tokens_left(limits, 0) or ''}
end
-- Images were stored by an earlier call. Since then a failover or a restart of Redis may have lost them.
for _, job in ipairs(jobs) do
  if redis.call('HLEN', K.IMAGES .. job.id) < job.images then
    return {'images', ''}
  end
end

local start_by, end_by = at + request.start_within_s, at + request.deadline_s

local was_limited = redis.call('HEXISTS', K.MAX_RUNNING, owner) == 1
local owner_waits = was_limited and has_parked(model, owner)

-- Accepts a job. Jobs of one call are created a microsecond apart, because lists are paged by that time.
local function accept(job, text, tokens, created_at)
  local id, record = job.id, K.JOB .. job.id
  redis.call('HSET', record,
    'id', id, 'owner', owner, 'model', model, 'class', class, 'status', 'queued', 'attempt', 0, 'worker', '',
    'retention_s', request.retention_s, 'fingerprint', request.fingerprint,
    'idempotency_key', id == jobs[1].id and request.idempotency_key or '',
    'created_at', stamp(created_at), 'end_by', stamp(end_by), 'bytes', job.bytes,
    'request_bytes', job.request_bytes, 'growth_bytes', job.growth_bytes, unpack(job.record))
  redis.call('HSET', K.REQUEST .. id, 'request', text)
  if tokens ~= '' then
    redis.call('HSET', K.REQUEST .. id, 'tokens', tokens, 'shared', job.shared)
  end
  if job.images > 0 then
    redis.call('PEXPIREAT', K.IMAGES .. id, string.format('%.0f', (end_by + request.images_slack_s) * 1000))
  end
  count_bytes('total', job.bytes)
  count_bytes('growth', job.growth_bytes)
  count_bytes('owner:' .. owner, job.bytes)
  if limits then
    redis.call('HSET', record, 'charged', job.tokens)
  end
  join_queue(id, model, class, next_turn(model, class, owner, request.weight))
  if owner_waits then
    park(id, model, owner)
  end
  redis.call('ZADD', K.OWNER .. owner, stamp(created_at), id)
  redis.call('ZADD', K.TIMERS, stamp(math.min(start_by, end_by)), id)
  emit(id, 'queued', '{"reason":"accepted"}')
end

for i, job in ipairs(jobs) do
  accept(job, ARGV[2 * i], ARGV[2 * i + 1], at + (i - 1) / 1e6)
end
if request.max_running > 0 then
  redis.call('HSET', K.MAX_RUNNING, owner, request.max_running)
elseif was_limited then
  redis.call('HDEL', K.MAX_RUNNING, owner)
end
if limits then
  charge_tokens(owner, limits.debt + expected_tokens, limits.reserved + expected_tokens, at)
end
keep_owner(owner, request.deadline_s + request.retention_s)
for _, oldest in ipairs(redis.call('ZRANGE', K.OWNER .. owner, 0, #jobs)) do
  if redis.call('EXISTS', K.JOB .. oldest) == 0 then -- checking one more than the new jobs bounds the list
    redis.call('ZREM', K.OWNER .. owner, oldest)
  end
end
local first = jobs[1].id
if request.idempotency_key ~= '' then
  redis.call('SET', K.IDEM .. owner .. ':' .. request.idempotency_key, first)
end
local wake = redis.call('SET', K.WAKE .. model, 1, 'NX', 'PX', 1000) and 1 or 0
return {'created', wake, queue_place(first, model, owner, class), limits and tokens_left(limits, expected_tokens) or '',
  unpack(redis.call('HGETALL', K.JOB .. first))}
