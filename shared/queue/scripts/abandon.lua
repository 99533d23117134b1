-- uses: family
-- Stops a job and its children, unless a client has joined the job since it was marked.
-- ARGV: job id, the time that detach.lua returned
-- Returns 1 if the job was abandoned, else 0.
local id, kept_until = ARGV[1], ARGV[2]
if redis.call('HGET', K.JOB .. id, 'kept_until') ~= kept_until then
  return 0
end
for _, job in ipairs(family(id)) do
  stop(job, 'cancelled')
end
return 1
