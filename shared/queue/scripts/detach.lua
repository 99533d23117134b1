-- Marks jobs whose client has lost its connection, so that the client's next try can join them.
-- ARGV: job ids
local at = stamp(now())
for _, id in ipairs(ARGV) do
  if redis.call('EXISTS', K.JOB .. id) == 1 then
    redis.call('HSET', K.JOB .. id, 'detached_at', at)
  end
end
return at
