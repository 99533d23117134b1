-- Cancels or expires a job: at once when it waits, by asking its worker when it runs.
-- ARGV: id, 'cancelled' | 'expired'
-- Returns 'done', 'asked', 'ended' (it had ended before) or 'missing'
local id, as = ARGV[1], ARGV[2]
local status = redis.call('HGET', K.JOB .. id, 'status')
if not status then
  return 'missing'
elseif status == 'queued' then
  finish(id, as, {})
  return 'done'
elseif status == 'running' then
  redis.call('HSETNX', K.JOB .. id, 'stop_as', as)
  return 'asked'
end
return 'ended'
