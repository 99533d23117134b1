-- Creates or updates an operation, with the time by Redis's clock.
-- ARGV: operation id, seconds that it is kept, then fields as name, value, …
-- Returns {creation time, update time}
local id, lifetime_s = ARGV[1], tonumber(ARGV[2])
local key = K.OPERATION .. id
local seconds = now()
local at = stamp(seconds)
redis.call('HSET', key, 'updated_at', at, unpack(ARGV, 3))
if redis.call('HSETNX', key, 'created_at', at) == 1 then
  redis.call('ZADD', K.OPERATIONS, at, id)
  redis.call('ZREMRANGEBYSCORE', K.OPERATIONS, '-inf', stamp(seconds - lifetime_s))
end
redis.call('EXPIRE', key, lifetime_s)
return {redis.call('HGET', key, 'created_at'), at}
