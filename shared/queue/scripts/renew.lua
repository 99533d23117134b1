-- Renews a worker's lease.
-- ARGV: worker, seconds
-- Returns {1 when the lease had held or 0 when it is a new one,
-- {id, attempt, claimed_at, stop word or '', … of each running job}, {id, claimed_at, … of each reserved job}}
local worker = ARGV[1]
local lease = redis.call('ZSCORE', K.LEASES, worker)
redis.call('ZADD', K.LEASES, stamp(now() + tonumber(ARGV[2])), worker)
redis.call('HSETNX', K.EXTENSIONS, worker, ARGV[2])
local running = {}
for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING .. worker)) do
  local attempt, claimed_at, stop = unpack(redis.call('HMGET', K.JOB .. id, 'attempt', 'claimed_at', 'stop_as'))
  running[#running + 1] = id
  running[#running + 1] = attempt or '0'
  running[#running + 1] = claimed_at or ''
  running[#running + 1] = stop or ''
end
local reserved = {}
for _, id in ipairs(redis.call('SMEMBERS', K.RESERVED .. worker)) do
  reserved[#reserved + 1] = id
  reserved[#reserved + 1] = redis.call('HGET', K.JOB .. id, 'claimed_at') or ''
end
return {lease and 1 or 0, running, reserved}
