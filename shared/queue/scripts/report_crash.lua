-- uses: suspicion crash
-- Handles the crash of a worker process: its jobs return to the queue, and a job that has caused too many crashes fails.
-- A repeated call changes nothing.
-- ARGV: a JSON object with
--   workers      ids of the process's workers
--   in_flight    ids of the jobs that it was running; empty if it was idle or loaded a model
--   max_deaths   number of consecutive crashes with a job as the only suspect after which the job fails
--   exit_status  how the process ended, for the error message
-- Returns {models that have queued jobs because of this}, {suspects}, {jobs that failed}
local crash = cjson.decode(ARGV[1])
return {handle_crash(crash.workers, crash.in_flight, crash.max_deaths, crash.exit_status)}
