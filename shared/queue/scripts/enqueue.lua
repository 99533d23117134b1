-- Accepts a job: the record, the request, the place in the queue, the first event. Sent twice, it answers the same.
-- ARGV: a JSON object with
--   id, owner, model, class, retention_s, idempotency_key or '', fingerprint, start_within_s, deadline_s
--   images, images_slack_s       how many images were put for it, and seconds that they outlive the deadline
--   request_bytes, growth_bytes  what the job occupies now, and what its log and text may grow to
--   max_queue                    most jobs that may wait for the model; 0: no bound
--   queue_bytes, owner_bytes     bounds of what unfinished jobs may occupy, in all and of one owner; 0: half of Redis's
--                                maxmemory (without one: an eighth of its machine's memory), and a quarter of that
--   memory_share                 part of maxmemory that Redis may use with what unfinished jobs may still grow by
-- then the request as JSON, its packed token ids or '', the length of the shared prefix, and record fields as
-- name, value, …
-- Returns {'created' or 'exists', whether to wake the model's workers, rank in the queue or '', record as name, value, …};
-- {'reused'}; {'full'}; {'too large'}; {'owner full'}; {'bytes full'}; {'memory full'}; {'images'} when the images are not here
local ask = cjson.decode(ARGV[1])
local id, owner, model, class = ask.id, ask.owner, ask.model, ask.class
local job, bytes = K.JOB .. id, ask.request_bytes + ask.growth_bytes

-- The proof of durability that follows covers only what this connection has written. So a repeated call must write as
-- well: it sets the expiry that the record has anyway, which needs no memory.
local function exists(existing)
  local key = K.JOB .. existing
  local left = redis.call('PTTL', key)
  redis.call('PEXPIRE', key, left < 0 and '1000000000' or math.max(left, 1))
  if left < 0 then
    redis.call('PERSIST', key)
  end
  local rank = redis.call('ZRANK', K.QUEUE .. redis.call('HGET', key, 'model'), existing)
  return {'exists', 0, rank or '', unpack(redis.call('HGETALL', key))}
end

-- Why there is no room for the job; nothing when there is.
local function refusal()
  if ask.max_queue > 0 and redis.call('ZCARD', K.QUEUE .. model) >= ask.max_queue then
    return 'full'
  end
  local total, own, growth = unpack(redis.call('HMGET', K.BYTES, 'total', 'owner:' .. owner, 'growth'))
  local used, most, system = unpack(redis.call('HMGET', K.MEMORY, 'used', 'max', 'system'))
  total, own, used, most = tonumber(total or '0'), tonumber(own or '0'), tonumber(used or '0'), tonumber(most or '0')
  local queue_bytes = ask.queue_bytes > 0 and ask.queue_bytes or (most > 0 and most or tonumber(system or '0') / 4) / 2
  local owner_bytes = ask.owner_bytes > 0 and ask.owner_bytes or queue_bytes / 4
  if owner_bytes > 0 and bytes > owner_bytes then
    return 'too large'
  elseif owner_bytes > 0 and own + bytes > owner_bytes then
    return 'owner full'
  elseif queue_bytes > 0 and total + bytes > queue_bytes then
    return 'bytes full'
  elseif most > 0 and used + tonumber(growth or '0') + bytes > ask.memory_share * most then
    return 'memory full'
  end
end

if ask.idempotency_key ~= '' then
  local first = redis.call('GET', K.IDEM .. owner .. ':' .. ask.idempotency_key)
  local print = first and redis.call('HGET', K.JOB .. first, 'fingerprint')
  if print then
    return print == ask.fingerprint and exists(first) or {'reused'}
  end
end
if redis.call('EXISTS', job) == 1 then
  return exists(id)
end
local refused = refusal()
if refused then
  return {refused}
end
-- Images were written by another call: this server may be another one, or have come back without its last writes.
if redis.call('HLEN', K.IMAGES .. id) < ask.images then
  return {'images'}
end

local at = now()
local start_by, end_by = at + ask.start_within_s, at + ask.deadline_s
redis.call('HSET', job,
  'id', id, 'owner', owner, 'model', model, 'class', class, 'status', 'queued', 'attempt', 0, 'worker', '',
  'retention_s', ask.retention_s, 'idempotency_key', ask.idempotency_key, 'fingerprint', ask.fingerprint,
  'created_at', stamp(at), 'end_by', stamp(end_by), 'bytes', bytes,
  'request_bytes', ask.request_bytes, 'growth_bytes', ask.growth_bytes, unpack(ARGV, 5))
redis.call('HSET', K.REQUEST .. id, 'request', ARGV[2])
if ARGV[3] ~= '' then
  redis.call('HSET', K.REQUEST .. id, 'tokens', ARGV[3], 'shared', ARGV[4])
end
if ask.images > 0 then
  redis.call('PEXPIREAT', K.IMAGES .. id, string.format('%.0f', (end_by + ask.images_slack_s) * 1000))
end
count_bytes('total', bytes)
count_bytes('growth', ask.growth_bytes)
count_bytes('owner:' .. owner, bytes)
join_queue(id, model, class, next_turn(model, class, owner))
redis.call('ZADD', K.OWNER .. owner, stamp(at), id)
keep_owner(owner, ask.deadline_s + ask.retention_s)
for _, oldest in ipairs(redis.call('ZRANGE', K.OWNER .. owner, 0, 1)) do
  if redis.call('EXISTS', K.JOB .. oldest) == 0 then -- two out for one in: the list stays as long as its jobs are many
    redis.call('ZREM', K.OWNER .. owner, oldest)
  end
end
redis.call('ZADD', K.TIMERS, stamp(math.min(start_by, end_by)), id)
if ask.idempotency_key ~= '' then
  redis.call('SET', K.IDEM .. owner .. ':' .. ask.idempotency_key, id)
end
emit(id, 'queued', '{"reason":"accepted"}')
local wake = redis.call('SET', K.WAKE .. model, 1, 'NX', 'PX', 1000) and 1 or 0
return {'created', wake, redis.call('ZRANK', K.QUEUE .. model, id), unpack(redis.call('HGETALL', job))}
