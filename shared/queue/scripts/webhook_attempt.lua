-- Begins an attempt of a delivery.
-- ARGV: the leader's token, delivery, seconds after which another attempt may begin if this one's end is never recorded
-- Returns the record as name, value, …; nothing if the delivery is not pending or the caller does not lead.
local leader, id, timeout_s = ARGV[1], ARGV[2], tonumber(ARGV[3])
local key = K.WEBHOOK .. id
if redis.call('GET', K.LEADER) ~= leader then
  return {}
elseif redis.call('HGET', key, 'status') ~= 'pending' then
  redis.call('ZREM', K.WEBHOOKS_DUE, id)
  return {}
end
local due = stamp(now() + timeout_s)
redis.call('HINCRBY', key, 'attempts', 1)
redis.call('HSET', key, 'next_at', due)
redis.call('ZADD', K.WEBHOOKS_DUE, due, id)
return redis.call('HGETALL', key)
