-- Changes a batch's record and its status (`web.batches.store`).
-- ARGV[1]: a JSON object with
--   id, status, allowed      the new status, and the statuses from which it may be reached
--   terminal, retention_s    whether the new status is final, and how long the record is kept then
--   leader                   the token of the calling leader; '' for calls of the API
-- ARGV[2..]: record fields as name, value, …
-- Returns {'changed', the record as name, value, …}, {'not leader'}, or {'refused'} if the status is none of `allowed`.
local request = cjson.decode(ARGV[1])
local batch = K.BATCH .. request.id
if request.leader ~= '' and redis.call('GET', K.LEADER) ~= request.leader then
  return {'not leader'}
end
local status, owner, counts = unpack(redis.call('HMGET', batch, 'status', 'owner', 'counts'))
local permitted = false
for _, each in ipairs(request.allowed) do
  permitted = permitted or each == status
end
if not permitted then
  return {'refused'}
end
redis.call('HSET', batch, 'status', request.status, unpack(ARGV, 2))
local latest = redis.call('HGET', batch, 'counts')
if latest and latest ~= counts then
  local before, after = cjson.decode(counts or '{}'), cjson.decode(latest)
  for _, outcome in ipairs({'completed', 'failed'}) do
    redis.call('HINCRBY', K.BATCH_COUNTS, 'lines_' .. outcome, (after[outcome] or 0) - (before[outcome] or 0))
  end
end
if status ~= request.status then
  redis.call('HSET', batch, 'at:' .. request.status, stamp(now()))
end
if request.terminal then
  redis.call('HINCRBY', K.BATCH_COUNTS, request.status, 1)
  publish_event('batch.' .. request.status, request.id, owner)
  redis.call('ZREM', K.UNFINISHED_BATCHES, request.id)
  redis.call('ZREM', K.UNFINISHED_BATCHES .. ':' .. owner, request.id)
  redis.call('EXPIRE', batch, request.retention_s)
end
return {'changed', unpack(redis.call('HGETALL', batch))}
