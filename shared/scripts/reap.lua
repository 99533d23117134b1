-- Takes the jobs of lapsed leases back and expires jobs whose time is over. Any process may call it at any time.
-- ARGV: losses a job may have, most expired jobs a call
-- Returns model, id for each job that waits again.
local most_losses = tonumber(ARGV[1])
local at = now()
local back = {}

for _, worker in ipairs(redis.call('ZRANGEBYSCORE', K.LEASES, '-inf', stamp(at))) do
  for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING .. worker)) do
    local job = K.JOB .. id
    local status, holder, model = unpack(redis.call('HMGET', job, 'status', 'worker', 'model'))
    if status == 'running' and holder == worker then
      local losses = redis.call('HINCRBY', job, 'losses', 1)
      if losses >= most_losses then
        finish(id, 'failed', {'error_code', 'worker_lost', 'error_message',
          'The job was lost with its worker ' .. losses .. ' times.'})
      elseif requeue(id, worker) then
        if losses == most_losses - 1 then
          redis.call('HSET', job, 'alone', 1)
        end
        back[#back + 1] = model
        back[#back + 1] = id
      end
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
