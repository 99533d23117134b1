-- uses: suspicion deaths
-- A worker process has died: its jobs return to the queue at once, and the job that is to blame fails when it has killed
-- often enough. Sent twice, the second call changes nothing.
-- ARGV: a JSON object with
--   workers      ids of the process's workers
--   in_flight    ids of the jobs that it was working on; empty while it was idle or loaded a model
--   most_deaths  deaths in a row that a job may be the only suspect of
--   exit         how the process ended, for the error message
-- Returns {models that have waiting jobs now}, {suspects}, {jobs that failed}
local death = cjson.decode(ARGV[1])
return {bury(death.workers, death.in_flight, death.most_deaths, death.exit)}
