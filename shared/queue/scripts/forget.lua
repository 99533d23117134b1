-- Deletes a job that has ended, with its log.
-- ARGV: id
-- Returns 'done', 'active' or 'missing'
local id = ARGV[1]
local status, owner, idem = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'owner', 'idempotency_key'))
if not status then
  return 'missing'
elseif status == 'queued' or status == 'running' then
  return 'active'
end
redis.call('DEL', K.JOB .. id, K.LOG .. id)
redis.call('ZREM', K.OWNER .. owner, id)
if idem ~= '' then
  redis.call('DEL', K.IDEM .. owner .. ':' .. idem)
end
return 'done'
