-- Accepts a job: writes its record, request, place in the queue and first event. A repeated call returns the same job.
-- ARGV[1]: a JSON object with
--   id, owner, model, class, retention_s, idempotency_key or '', fingerprint, start_within_s, deadline_s
--   images, images_slack_s       number of images stored for the job, and seconds that they outlive its deadline
--   request_bytes, growth_bytes  bytes that the job occupies now, and bytes that its log and its text may add
--   max_queue                    maximum number of queued jobs of the model; 0: unlimited
--   owner_queue                  maximum number of the owner's queued jobs of the model
--   queue_bytes                  maximum bytes of all unfinished jobs; 0: half of Redis's maxmemory or, if it has none,
--                                an eighth of the memory of its machine
--   owner_bytes                  maximum bytes of the owner's unfinished jobs; 0: a quarter of queue_bytes
--   memory_share                 share of maxmemory that used memory and expected growth may reach together
-- ARGV[2..]: the request as JSON, its packed token ids or '', the length of the shared prefix, then record fields as
-- name, value, …
-- Returns {'created' or 'exists', 1 if the model's workers must be woken else 0, rank in the queue or '', record as
--   name, value, …}, or why the job was rejected: {'reused'} (Idempotency-Key with another fingerprint), {'full'},
--   {'too large'}, {'owner queue full'}, {'owner full'}, {'bytes full'}, {'memory full'} or {'images'} (images are missing)
--
-- Invariants: a rejected job writes nothing, except that the owners' jobs may be counted anew. An accepted job and a repeated call both write something, because the
-- durability check that follows covers only writes of the same connection.
local request = cjson.decode(ARGV[1])
local id, owner, model, class = request.id, request.owner, request.model, request.class
local job, bytes = K.JOB .. id, request.request_bytes + request.growth_bytes

-- Returns the job that the first call created. As its write, it sets the expiry that the record has anyway, because that
-- needs no memory.
local function exists(existing)
  local key = K.JOB .. existing
  local ttl_ms = redis.call('PTTL', key)
  redis.call('PEXPIRE', key, ttl_ms < 0 and '1000000000' or math.max(ttl_ms, 1))
  if ttl_ms < 0 then
    redis.call('PERSIST', key)
  end
  local rank = redis.call('ZRANK', K.QUEUE .. redis.call('HGET', key, 'model'), existing)
  return {'exists', 0, rank or '', unpack(redis.call('HGETALL', key))}
end

local RECOUNT_S = 10

-- Whether the owner has as many queued jobs of the model as it may have. Counts them anew before it says so, but not often.
local function owner_queue_full()
  local key = K.QUEUED .. model
  local count, counted_at = unpack(redis.call('HMGET', key, owner, 'counted_at'))
  local missing = not counted_at and redis.call('EXISTS', K.QUEUE .. model) == 1
  local full = tonumber(count or '0') >= request.owner_queue
  if missing or (full and now() - tonumber(counted_at or '0') >= RECOUNT_S) then
    recount_queue(model)
    full = tonumber(redis.call('HGET', key, owner) or '0') >= request.owner_queue
  end
  return full
end

-- Returns which limit the job exceeds; nil if it exceeds none.
local function exceeded_limit()
  if owner_queue_full() then
    return 'owner queue full'
  elseif request.max_queue > 0 and redis.call('ZCARD', K.QUEUE .. model) >= request.max_queue then
    return 'full'
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
    return 'owner full'
  elseif queue_bytes > 0 and total + bytes > queue_bytes then
    return 'bytes full'
  elseif max > 0 and used + tonumber(growth or '0') + bytes > request.memory_share * max then
    return 'memory full'
  end
end

if request.idempotency_key ~= '' then
  local first = redis.call('GET', K.IDEM .. owner .. ':' .. request.idempotency_key)
  local fingerprint = first and redis.call('HGET', K.JOB .. first, 'fingerprint')
  if fingerprint then
    return fingerprint == request.fingerprint and exists(first) or {'reused'}
  end
end
if redis.call('EXISTS', job) == 1 then
  return exists(id)
end
local limit = exceeded_limit()
if limit then
  return {limit}
end
-- Images were stored by an earlier call. Since then a failover or a restart of Redis may have lost them.
if redis.call('HLEN', K.IMAGES .. id) < request.images then
  return {'images'}
end

local at = now()
local start_by, end_by = at + request.start_within_s, at + request.deadline_s
redis.call('HSET', job,
  'id', id, 'owner', owner, 'model', model, 'class', class, 'status', 'queued', 'attempt', 0, 'worker', '',
  'retention_s', request.retention_s, 'idempotency_key', request.idempotency_key, 'fingerprint', request.fingerprint,
  'created_at', stamp(at), 'end_by', stamp(end_by), 'bytes', bytes,
  'request_bytes', request.request_bytes, 'growth_bytes', request.growth_bytes, unpack(ARGV, 5))
redis.call('HSET', K.REQUEST .. id, 'request', ARGV[2])
if ARGV[3] ~= '' then
  redis.call('HSET', K.REQUEST .. id, 'tokens', ARGV[3], 'shared', ARGV[4])
end
if request.images > 0 then
  redis.call('PEXPIREAT', K.IMAGES .. id, string.format('%.0f', (end_by + request.images_slack_s) * 1000))
end
count_bytes('total', bytes)
count_bytes('growth', request.growth_bytes)
count_bytes('owner:' .. owner, bytes)
join_queue(id, model, class, next_turn(model, class, owner))
redis.call('ZADD', K.OWNER .. owner, stamp(at), id)
keep_owner(owner, request.deadline_s + request.retention_s)
for _, oldest in ipairs(redis.call('ZRANGE', K.OWNER .. owner, 0, 1)) do
  if redis.call('EXISTS', K.JOB .. oldest) == 0 then -- checking two per new job bounds the list
    redis.call('ZREM', K.OWNER .. owner, oldest)
  end
end
redis.call('ZADD', K.TIMERS, stamp(math.min(start_by, end_by)), id)
if request.idempotency_key ~= '' then
  redis.call('SET', K.IDEM .. owner .. ':' .. request.idempotency_key, id)
end
emit(id, 'queued', '{"reason":"accepted"}')
local wake = redis.call('SET', K.WAKE .. model, 1, 'NX', 'PX', 1000) and 1 or 0
return {'created', wake, redis.call('ZRANK', K.QUEUE .. model, id), unpack(redis.call('HGETALL', job))}
