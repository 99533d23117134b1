-- Deletes a job that has ended, with all its keys.
-- ARGV: job id
-- Returns 'done', 'active' if the job has not ended, or 'missing'.
local id = ARGV[1]
local status, owner, idempotency_key, bytes = unpack(redis.call('HMGET', K.JOB .. id,
  'status', 'owner', 'idempotency_key', 'request_bytes'))
if not status then
  return 'missing'
elseif status == 'queued' or status == 'running' then
  return 'active'
end
drop_failed_request(id .. ' ' .. (bytes or '0'))
redis.call('UNLINK', K.JOB .. id, K.LOG .. id, K.OUTPUT .. id)
redis.call('ZREM', K.OWNER .. owner, id)
if idempotency_key ~= '' then
  redis.call('DEL', K.IDEM .. owner .. ':' .. idempotency_key)
end
return 'done'
