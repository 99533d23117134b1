-- Renews a worker's lease.
-- ARGV: worker, lifetime of the lease in seconds
-- Returns {1 if the previous lease was still there, else 0,
--   {id, attempt, claimed_at, 'cancelled' or 'expired' if it must stop, else '', of each running job},
--   {id, claimed_at, of each reserved job}}
local worker, lifetime_s = ARGV[1], ARGV[2]
local lease = redis.call('ZSCORE', K.LEASES, worker)
redis.call('ZADD', K.LEASES, stamp(now() + tonumber(lifetime_s)), worker)
redis.call('HSETNX', K.EXTENSIONS, worker, lifetime_s)
local running = {}
for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING .. worker)) do
  local attempt, claimed_at, stop_as = unpack(redis.call('HMGET', K.JOB .. id, 'attempt', 'claimed_at', 'stop_as'))
  running[#running + 1] = id
  running[#running + 1] = attempt or '0'
  running[#running + 1] = claimed_at or ''
  running[#running + 1] = stop_as or ''
end
local reserved = {}
for _, id in ipairs(redis.call('SMEMBERS', K.RESERVED .. worker)) do
  reserved[#reserved + 1] = id
  reserved[#reserved + 1] = redis.call('HGET', K.JOB .. id, 'claimed_at') or ''
end
return {lease and 1 or 0, running, reserved}
