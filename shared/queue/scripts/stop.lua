-- uses: family
-- Ends queued jobs at once; marks running ones, so that their workers stop them. Children of a job stop with it.
-- ARGV: job id, 'cancelled' or 'expired'
-- Returns 'missing' if there is no such job. Otherwise, for the job and its children together: 'stopping' if a worker will
-- stop one of them, 'done' if all have ended and one did now, 'ended' if all had ended before.
local id, stop_as = ARGV[1], ARGV[2]
if redis.call('EXISTS', K.JOB .. id) == 0 then
  return 'missing'
end
local results = {}
for _, job in ipairs(family(id)) do
  results[stop(job, stop_as)] = true
end
return results.stopping and 'stopping' or results.done and 'done' or 'ended'
