-- Takes the jobs of lapsed leases back and expires jobs whose time is over. Any process may call it at any time.
-- ARGV: losses a job may have, most expired jobs a call
-- Returns the seconds until a lease may lapse next, or '' when there is none; then model, id for each job that waits
-- again.
local most_losses = tonumber(ARGV[1])
local at = now()
local back = {''}

-- A lease runs only while somebody could renew it. When this is another server than at the last pass, restarted or
-- failed over to, when nobody passed by for long, as while Redis was out of reach or the machine slept, or when the
-- clock was set back, then every lease gets its full time once more, from now. A worker has that only once until it
-- renews, so one that died is taken back.
local MISSED_S = 2 -- passes come each second
local NOTED_S = 0.5 -- and not each of them needs to be noted
local described = redis.pcall('INFO', 'server')
local server = type(described) == 'string' and string.match(described, 'run_id:(%w+)') or ''
local passed_at, passed_on = unpack(redis.call('HMGET', K.PASSED, 'at', 'server'))
local since = at - (tonumber(passed_at or at) or at)
if passed_on and (passed_on ~= server or math.abs(since) > MISSED_S) then
  for _, worker in ipairs(redis.call('ZRANGE', K.LEASES, 0, -1)) do
    local seconds = redis.call('HGET', K.GRACE, worker)
    if seconds then
      redis.call('ZADD', K.LEASES, stamp(at + tonumber(seconds)), worker)
      redis.call('HDEL', K.GRACE, worker)
    end
  end
end
if passed_on ~= server or math.abs(since) > NOTED_S then
  redis.call('HSET', K.PASSED, 'at', stamp(at), 'server', server)
end

for _, worker in ipairs(redis.call('ZRANGEBYSCORE', K.LEASES, '-inf', stamp(at))) do
  for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING .. worker)) do
    local status, holder, model = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'worker', 'model'))
    if status == 'running' and holder == worker and lose(id, worker, most_losses) then
      back[#back + 1] = model
      back[#back + 1] = id
    end
  end
  forget_worker(worker)
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

local lapses = redis.call('ZRANGE', K.LEASES, 0, 0, 'WITHSCORES')[2]
if lapses then
  back[1] = stamp(tonumber(lapses) - at)
end
return back
