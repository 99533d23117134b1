-- Deletes a job that has ended, with all its keys.
-- ARGV: id
-- Returns 'done', 'active' or 'missing'
local id = ARGV[1]
local status, owner, idem, bytes = unpack(redis.call('HMGET', K.JOB .. id,
  'status', 'owner', 'idempotency_key', 'request_bytes'))
if not status then
  return 'missing'
elseif status == 'queued' or status == 'running' then
  return 'active'
end
drop_failed_request(id .. ' ' .. (bytes or '0'))
redis.call('UNLINK', K.JOB .. id, K.LOG .. id, K.OUTPUT .. id)
redis.call('ZREM', K.OWNER .. owner, id)
if idem ~= '' then
  redis.call('DEL', K.IDEM .. owner .. ':' .. idem)
end
return 'done'
