-- uses: suspicion deaths layout
-- Takes back what lapsed leases held, expires jobs whose time is over, and notes how much memory Redis has. Any process
-- may call it at any time.
-- ARGV: deaths a job may cause, most expired jobs a call, bytes that requests of failed jobs may occupy
-- Returns {seconds until a lease may lapse next or '', models that have waiting jobs now…}
local most_deaths = tonumber(ARGV[1])
local at = now()

-- A lease must not lapse while its worker cannot renew it. So every lease is extended once by its full time when this
-- server is not that of the last pass (restart or failover), when the last pass was long ago (Redis was out of reach, or
-- the machine slept), or when the clock was set back. A lease is extended again only after a renewal, so that of a dead
-- worker lapses.
local MISSED_S = 2 -- passes come each second
local NOTED_S = 0.5 -- shortest time between two notes of a pass
local described = redis.pcall('INFO', 'server')
local server = type(described) == 'string' and string.match(described, 'run_id:(%w+)') or ''
local passed_at, passed_on = unpack(redis.call('HMGET', K.PASSED, 'at', 'server'))
local since = at - (tonumber(passed_at or at) or at)
if passed_on and (passed_on ~= server or math.abs(since) > MISSED_S) then
  for _, worker in ipairs(redis.call('ZRANGE', K.LEASES, 0, -1)) do
    local seconds = redis.call('HGET', K.EXTENSIONS, worker)
    if seconds then
      redis.call('ZADD', K.LEASES, stamp(at + tonumber(seconds)), worker)
      redis.call('HDEL', K.EXTENSIONS, worker)
    end
  end
end
if passed_on ~= server or math.abs(since) > NOTED_S then
  redis.call('HSET', K.PASSED, 'at', stamp(at), 'server', server)
  local memory = redis.pcall('INFO', 'memory')
  if type(memory) == 'string' then
    redis.call('HSET', K.MEMORY, 'used', memory:match('used_memory:(%d+)'), 'max', memory:match('maxmemory:(%d+)'),
      'system', memory:match('total_system_memory:(%d+)') or '0')
  end
  redis.call('HSET', K.BYTES, 'failed_limit', ARGV[3])
end

local models = {}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', K.LEASES, '-inf', stamp(at))) do
  -- What the process was doing is unknown, so the jobs in flight are all that it ran, and all that it claimed to run at
  -- once: a job may kill before its admission is written. Spare jobs were not in flight.
  local suspects = redis.call('SMEMBERS', K.RUNNING .. worker)
  for _, id in ipairs(suspects) do
    adopt(id, true)
  end
  for _, id in ipairs(redis.call('SMEMBERS', K.RESERVED .. worker)) do
    if redis.call('HEXISTS', K.JOB .. id, 'spare') == 0 then
      suspects[#suspects + 1] = id
    end
  end
  for _, model in ipairs(bury({worker}, suspects, most_deaths)) do
    models[#models + 1] = model
  end
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

for _, member in ipairs(redis.call('ZRANGEBYSCORE', K.FAILED, '-inf', stamp(at), 'LIMIT', 0, 100)) do
  drop_failed_request(member)
end

local lapses = redis.call('ZRANGE', K.LEASES, 0, 0, 'WITHSCORES')[2]
return {lapses and stamp(tonumber(lapses) - at) or '', unpack(distinct(models))}
