-- Marks a job whose client has lost its connection, so that the client's next try can join it.
-- ARGV: job id, seconds for which the job can be joined
-- Returns the time until which it can be joined.
local id, kept_until = ARGV[1], stamp(now() + tonumber(ARGV[2]))
if redis.call('EXISTS', K.JOB .. id) == 1 then
  redis.call('HSET', K.JOB .. id, 'kept_until', kept_until)
end
return kept_until
