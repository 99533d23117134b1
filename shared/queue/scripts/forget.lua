-- uses: family erase
-- Deletes a job that has ended and its children, with all their keys. Records, texts and logs stay for a few seconds, marked
-- as deleted, so that requests which have read the jobs before receive their ends.
-- ARGV: job id, seconds until the remaining keys are gone, 'erase' to erase the jobs from the archive and from the prefix
--   caches of workers, too
-- Returns 'done', 'active' if one of them has not ended, or 'missing'.
local id, rest_s, erased = ARGV[1], ARGV[2], ARGV[3] == 'erase'

local function forget(job)
  local owner, idempotency_key, bytes, deleted, finished = unpack(redis.call('HMGET', K.JOB .. job,
    'owner', 'idempotency_key', 'request_bytes', 'deleted', 'finished_at'))
  if not owner or deleted then
    return
  end
  drop_failed_request(job .. ' ' .. (bytes or '0'))
  drop_unarchived(job .. ' 0')
  drop_unarchived(job .. ' ' .. (bytes or '0'))
  if erased then
    erase({job}, owner, finished or stamp(now()))
  end
  redis.call('HSET', K.JOB .. job, 'deleted', 1)
  for _, key in ipairs({K.JOB, K.LOG, K.OUTPUT}) do
    if redis.call('TTL', key .. job) > tonumber(rest_s) then
      redis.call('EXPIRE', key .. job, rest_s)
    end
  end
  redis.call('ZREM', K.OWNER .. owner, job)
  if idempotency_key ~= '' then
    redis.call('DEL', K.IDEM .. owner .. ':' .. idempotency_key)
  end
end

local status, deleted = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'deleted'))
if not status or deleted then
  return 'missing'
end
for _, job in ipairs(family(id)) do
  status = redis.call('HGET', K.JOB .. job, 'status')
  if status == 'queued' or status == 'running' then
    return 'active'
  end
end
for _, job in ipairs(family(id)) do
  forget(job)
end
return 'done'
