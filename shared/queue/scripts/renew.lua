-- Renews a worker's lease.
-- ARGV: worker, seconds
-- Returns 1 when the lease had held, 0 when it is a new one; then id, attempt, stop word or '' for each job the
-- worker holds.
local worker = ARGV[1]
local at = now()
local lease = redis.call('ZSCORE', K.LEASES, worker)
redis.call('ZADD', K.LEASES, stamp(at + tonumber(ARGV[2])), worker)
redis.call('HSETNX', K.GRACE, worker, ARGV[2])
local reply = {lease and 1 or 0}
for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING .. worker)) do
  local attempt, stop = unpack(redis.call('HMGET', K.JOB .. id, 'attempt', 'stop_as'))
  reply[#reply + 1] = id
  reply[#reply + 1] = attempt or '0'
  reply[#reply + 1] = stop or ''
end
return reply
