-- Records the result of an attempt, or sends a dead delivery again.
-- ARGV: delivery; new status ('delivered', 'dead', 'pending' or 'resend'); time of the next attempt; seconds for which the
--   record is kept; HTTP status and error of the attempt, or ''
-- Returns 1, or 0 if nothing was changed.
--
-- Invariant: a delivery that was confirmed is never pending again.
local id, status, due, keep_s, code, reason = unpack(ARGV)
local key = K.WEBHOOK .. id
local before = redis.call('HGET', key, 'status')
if not before or before == 'delivered' or (status == 'resend') ~= (before == 'dead') then
  return 0
end
if status == 'resend' then
  redis.call('HSET', key, 'attempts', 0)
  redis.call('HDEL', key, 'ended_at')
  redis.call('PERSIST', key)
  redis.call('ZREM', K.WEBHOOKS_DEAD, id)
  status = 'pending'
else
  redis.call('HSET', key, 'last_status', code, 'last_error', reason)
  redis.call('HINCRBY', K.WEBHOOK_COUNTS, status == 'pending' and 'failed' or status, 1)
end
redis.call('HSET', key, 'status', status)
if status == 'pending' then
  redis.call('HSET', key, 'next_at', due)
  redis.call('ZADD', K.WEBHOOKS_DUE, due, id)
  return 1
end
redis.call('HSET', key, 'ended_at', stamp(now()))
redis.call('EXPIRE', key, keep_s)
redis.call('ZREM', K.WEBHOOKS_DUE, id)
if status == 'dead' then
  redis.call('ZADD', K.WEBHOOKS_DEAD, stamp(now()), id)
end
return 1
