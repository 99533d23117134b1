-- Accepts a job: the record, its place in line, its first event. Sent twice, it answers the same.
-- ARGV: id, owner, model, class, retention_s, idempotency key or '', fingerprint, most that may wait,
--       start_within_s, deadline_s, how many images were put for it, seconds that they outlive the deadline,
--       then record fields as name, value, …
-- Returns 'created' or 'exists', then the record as name, value, … ; 'reused' ; 'full' ; 'images' when they are not here
local id, owner, model, class, retention = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local idem, fingerprint, most = ARGV[6], ARGV[7], tonumber(ARGV[8])
local images = tonumber(ARGV[11])

local function answer(word, job)
  return {word, unpack(redis.call('HGETALL', K.JOB .. job))}
end

-- The proof of durability that is asked for behind this script covers what the same connection has written. So the
-- answer to a repeated call writes as well: something that leaves the record as it is, and needs no memory.
local function exists(job)
  local left = redis.call('PTTL', K.JOB .. job)
  redis.call('PEXPIRE', K.JOB .. job, left < 0 and '1000000000' or math.max(left, 1))
  if left < 0 then
    redis.call('PERSIST', K.JOB .. job)
  end
  return answer('exists', job)
end

if idem ~= '' then
  local first = redis.call('GET', K.IDEM .. owner .. ':' .. idem)
  local print = first and redis.call('HGET', K.JOB .. first, 'fingerprint')
  if print then
    if print ~= fingerprint then
      return {'reused'}
    end
    return exists(first)
  end
end
if redis.call('EXISTS', K.JOB .. id) == 1 then
  return exists(id)
end
if redis.call('ZCARD', K.QUEUE .. model) >= most then
  return {'full'}
end
-- They were written by another call: this server may be another one, or have come back without its last writes.
if redis.call('HLEN', K.IMAGES .. id) < images then
  return {'images'}
end

local at = now()
local start_by, end_by = at + tonumber(ARGV[9]), at + tonumber(ARGV[10])
redis.call('HSET', K.JOB .. id,
  'id', id, 'owner', owner, 'model', model, 'class', class, 'status', 'queued', 'attempt', 0, 'losses', 0,
  'retention_s', retention, 'idempotency_key', idem, 'fingerprint', fingerprint,
  'created_at', stamp(at), 'end_by', stamp(end_by), unpack(ARGV, 13))
if images > 0 then
  redis.call('PEXPIREAT', K.IMAGES .. id, string.format('%.0f', (end_by + tonumber(ARGV[12])) * 1000))
end
wait_in_line(id, model, class, next_turn(model, class, owner))
redis.call('ZADD', K.OWNER .. owner, stamp(at), id)
for _, oldest in ipairs(redis.call('ZRANGE', K.OWNER .. owner, 0, 1)) do
  if redis.call('EXISTS', K.JOB .. oldest) == 0 then -- two out for one in, or it would grow for owners who never list
    redis.call('ZREM', K.OWNER .. owner, oldest)
  end
end
redis.call('ZADD', K.TIMERS, stamp(math.min(start_by, end_by)), id)
if idem ~= '' then
  redis.call('SET', K.IDEM .. owner .. ':' .. idem, id)
end
emit(id, 'queued', '{"reason":"accepted"}')
return answer('created', id)
