-- Writes how an operation is now, with the moment by Redis's clock; a new one is also put into the list.
-- ARGV: id, seconds that it is kept, then fields as name, value, …
-- Returns when it was created and when it was updated
local id, lifetime = ARGV[1], tonumber(ARGV[2])
local key = K.OPERATION .. id
local seconds = now()
local at = stamp(seconds)
redis.call('HSET', key, 'updated_at', at, unpack(ARGV, 3))
if redis.call('HSETNX', key, 'created_at', at) == 1 then
  redis.call('ZADD', K.OPERATIONS, at, id)
  redis.call('ZREMRANGEBYSCORE', K.OPERATIONS, '-inf', stamp(seconds - lifetime))
end
redis.call('EXPIRE', key, lifetime)
return {redis.call('HGET', key, 'created_at'), at}
