-- Deletes a job that has ended, with all its keys. Its record, text and log stay for a few seconds, marked as deleted, so
-- that requests which have read the job before receive its end.
-- ARGV: job id, seconds until the remaining keys are gone
-- Returns 'done', 'active' if the job has not ended, or 'missing'.
local id, rest_s = ARGV[1], ARGV[2]
local status, owner, idempotency_key, bytes, deleted = unpack(redis.call('HMGET', K.JOB .. id,
  'status', 'owner', 'idempotency_key', 'request_bytes', 'deleted'))
if not status or deleted then
  return 'missing'
elseif status == 'queued' or status == 'running' then
  return 'active'
end
drop_failed_request(id .. ' ' .. (bytes or '0'))
redis.call('HSET', K.JOB .. id, 'deleted', 1)
for _, key in ipairs({K.JOB, K.LOG, K.OUTPUT}) do
  if redis.call('TTL', key .. id) > tonumber(rest_s) then
    redis.call('EXPIRE', key .. id, rest_s)
  end
end
redis.call('ZREM', K.OWNER .. owner, id)
if idempotency_key ~= '' then
  redis.call('DEL', K.IDEM .. owner .. ':' .. idempotency_key)
end
return 'done'
