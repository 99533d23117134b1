-- Takes the jobs of lapsed leases back and expires jobs whose time is over. Any process may call it at any time.
-- ARGV: losses a job may have, most expired jobs a call
-- Returns model, id for each job that waits again.
local most_losses = tonumber(ARGV[1])
local at = now()
local back = {}

for _, worker in ipairs(redis.call('ZRANGEBYSCORE', K.LEASES, '-inf', stamp(at))) do
  for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING .. worker)) do
    local status, holder, model = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'worker', 'model'))
    if status == 'running' and holder == worker and lose(id, worker, most_losses) then
      back[#back + 1] = model
      back[#back + 1] = id
    end
  end
  redis.call('DEL', K.RUNNING .. worker, K.WORKER .. worker)
  redis.call('ZREM', K.LEASES, worker)
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.TIMERS, '-inf', stamp(at), 'LIMIT', 0, ARGV[2])) do
  local status = redis.call('HGET', K.JOB .. id, 'status')
  if status == 'queued' then
    finish(id, 'expired', {})
  elseif status == 'running' then
    redis.call('HSETNX', K.JOB .. id, 'stop_as', 'expired')
  end
  redis.call('ZREM', K.TIMERS, id)
end
return back
