-- Ends a queued job at once; marks a running one, so that its worker stops it.
-- ARGV: job id, 'cancelled' or 'expired'
-- Returns 'done', 'stopping' (its worker will stop it), 'ended' (it had ended before) or 'missing'.
local id, stop_as = ARGV[1], ARGV[2]
local status = redis.call('HGET', K.JOB .. id, 'status')
if not status then
  return 'missing'
elseif status == 'queued' then
  finish(id, stop_as, {})
  return 'done'
elseif status == 'running' then
  redis.call('HSETNX', K.JOB .. id, 'stop_as', stop_as)
  return 'stopping'
end
return 'ended'
