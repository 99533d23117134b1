-- uses: suspicion crash layout running
-- Returns jobs of expired leases and parked jobs that may run to the queue, expires jobs whose time is over, and records
-- Redis's memory. Any process may call it at any time.
-- ARGV: number of consecutive crashes with a job as the only suspect after which the job fails, maximum jobs to expire in
--   this call, maximum bytes of the kept requests of ended jobs, 'all' if the requests of all jobs are kept, not only those
--   of failed ones
-- Returns {seconds until the next lease may expire or '', models that have queued jobs because of this…}
--
-- Invariant: a lease does not expire while its worker cannot renew it. So each lease is extended by its full lifetime,
-- once per renewal, if this server is not the one of the last pass (restart or failover), if the last pass was long ago
-- (Redis was unreachable, or the machine slept), or if the clock was set back. The lease of a dead worker is not renewed,
-- so it is extended at most once.
local max_deaths, max_expired, failed_limit, kept = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local at = now()
local OUTAGE_S = 2 -- passes are at most one second apart
local RECORD_S = 0.5 -- shortest interval between two records of a pass
local info = redis.pcall('INFO', 'server')
local server = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
local last_at, last_server = unpack(redis.call('HMGET', K.PASSED, 'at', 'server'))
local since = at - (tonumber(last_at or at) or at)

if last_server and (last_server ~= server or math.abs(since) > OUTAGE_S) then
  for _, worker in ipairs(redis.call('ZRANGE', K.LEASES, 0, -1)) do
    local seconds = redis.call('HGET', K.EXTENSIONS, worker)
    if seconds then
      redis.call('ZADD', K.LEASES, stamp(at + tonumber(seconds)), worker)
      redis.call('HDEL', K.EXTENSIONS, worker)
    end
  end
end
if last_server ~= server or math.abs(since) > RECORD_S then
  redis.call('HSET', K.PASSED, 'at', stamp(at), 'server', server)
  local memory = redis.pcall('INFO', 'memory')
  if type(memory) == 'string' then
    redis.call('HSET', K.MEMORY, 'used', memory:match('used_memory:(%d+)'), 'max', memory:match('maxmemory:(%d+)'),
      'system', memory:match('total_system_memory:(%d+)') or '0')
  end
  redis.call('HSET', K.BYTES, 'failed_limit', failed_limit)
  if kept == 'all' then
    redis.call('HSET', K.BYTES, 'keep_all', 1)
  elseif kept then -- processes of earlier versions do not say
    redis.call('HDEL', K.BYTES, 'keep_all')
  end
end

local models = {}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', K.LEASES, '-inf', stamp(at))) do
  -- It is unknown what the process was doing. So all jobs that it ran count as in flight, and all that it claimed to run
  -- at once, because a job may crash the process before its admission is written. Spare jobs were not in flight.
  local in_flight = redis.call('SMEMBERS', K.RUNNING .. worker)
  for _, id in ipairs(in_flight) do
    adopt(id, true)
  end
  for _, id in ipairs(redis.call('SMEMBERS', K.RESERVED .. worker)) do
    if redis.call('HEXISTS', K.JOB .. id, 'spare') == 0 then
      in_flight[#in_flight + 1] = id
    end
  end
  for _, model in ipairs(handle_crash({worker}, in_flight, max_deaths, '')) do
    models[#models + 1] = model
  end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.TIMERS, '-inf', stamp(at), 'LIMIT', 0, max_expired)) do
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

if redis.call('EXISTS', K.PARKED_COUNTS) == 1 then
  for _, model in ipairs(running.unpark(nil)) do
    models[#models + 1] = model
  end
end

local next_expiry = redis.call('ZRANGE', K.LEASES, 0, 0, 'WITHSCORES')[2]
return {next_expiry and stamp(tonumber(next_expiry) - at) or '', unpack(distinct(models))}
