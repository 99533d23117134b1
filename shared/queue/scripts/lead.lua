-- Acquires, renews or releases the leadership of the background processes (`web.background.leader`).
-- ARGV: the caller's token, milliseconds for which it leads; 0 releases
-- Returns 1 if the caller leads now.
local token, lifetime_ms = ARGV[1], tonumber(ARGV[2])
local leader = redis.call('GET', K.LEADER)
if leader and leader ~= token then
  return 0
elseif lifetime_ms == 0 then
  redis.call('DEL', K.LEADER)
  return 0
end
redis.call('SET', K.LEADER, token, 'PX', lifetime_ms)
return 1
