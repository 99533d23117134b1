-- Finds the job that crashes worker processes. A job becomes more suspect each time that it is in flight when a process
-- crashes. Jobs that were in flight in two consecutive crashes are restricted: each process runs at most half of the last
-- group of suspects at once. This is a binary search that never stops other jobs. Needs lib/job.lua.
--
-- Fields of a job's record:
--   suspicion     number of consecutive crashes in which the job was in flight and had not proven itself
--   patience      number of events that an attempt must write to prove the job. It doubles each time that the process of a
--                 proven job crashes; otherwise a job that crashes after N tokens of each attempt would always be proven
--   cohort        number of suspects in the last crash
--   deaths        number of consecutive crashes with this job as the only suspect; a crash counts half if other jobs had
--                 just started as well
--   admitted_seq  number of the event that started the current attempt; each later event carries at least one token
--
-- Invariants, simulated with 24 rows and one poison job (tests/unit/shared/test_suspicion.py): the poison job fails after
-- at most 3 + 1 + log2(rows) crashes, and no other job fails. Jobs that are not suspects of a crash must become more
-- suspect as well. Otherwise a job that was suspected before the poison job arrived would be blamed for its crashes.

local FIRST_PATIENCE = 8
local RESTRICTED_FROM = 2

local function read_suspect(id)
  local suspicion, patience, cohort, status, seq, admitted_seq = unpack(redis.call('HMGET', K.JOB .. id,
    'suspicion', 'patience', 'cohort', 'status', 'seq', 'admitted_seq'))
  local job = {id = id, suspicion = tonumber(suspicion or 0), patience = tonumber(patience or FIRST_PATIENCE)}
  local progress = status == 'running' and tonumber(seq) - tonumber(admitted_seq or seq) or 0
  job.proven = progress >= job.patience
  job.restricted = job.suspicion >= RESTRICTED_FROM and not job.proven
  job.max_together = math.max(1, math.floor(tonumber(cohort or 2) / 2))
  return job
end

-- Records one job's part in a crash. `weight` is added to `deaths` of a sole suspect; 0 if there are several suspects.
local function accuse(job, cohort, weight, is_suspect)
  local suspicion, patience = job.suspicion + 1, job.patience
  if job.proven then
    suspicion, patience = 1, 2 * patience
    redis.call('HDEL', K.JOB .. job.id, 'deaths')
  elseif weight > 0 and not is_suspect then
    -- The sole suspect may be innocent: jobs that started together with it are kept apart from it next time.
    suspicion = math.max(RESTRICTED_FROM, suspicion)
  end
  redis.call('HSET', K.JOB .. job.id, 'suspicion', suspicion, 'patience', patience, 'cohort', cohort)
  if weight > 0 and is_suspect then
    redis.call('HINCRBYFLOAT', K.JOB .. job.id, 'deaths', tostring(weight))
  end
end

-- Applies the crash of a process to the jobs that were in flight. Must be called before their attempts are ended. Returns
-- the suspects: the restricted jobs if there are any, else all jobs.
local function suspect(ids)
  local jobs, restricted, just_started = {}, 0, 0
  for i, id in ipairs(ids) do
    local job = read_suspect(id)
    jobs[i] = job
    restricted = restricted + (job.restricted and 1 or 0)
    just_started = just_started + ((job.restricted or job.proven) and 0 or 1)
  end
  local count = restricted > 0 and restricted or #jobs
  local weight = count > 1 and 0 or restricted == 1 and just_started > 0 and 0.5 or 1
  local suspects = {}
  for _, job in ipairs(jobs) do
    local is_suspect = restricted == 0 or job.restricted
    accuse(job, is_suspect and count or #jobs - count, weight, is_suspect)
    if is_suspect then
      suspects[#suspects + 1] = job.id
    end
  end
  return suspects
end

-- Whether a job was the only suspect of `max_deaths` consecutive crashes.
local function deaths_reached(id, max_deaths)
  return tonumber(redis.call('HGET', K.JOB .. id, 'deaths') or 0) >= max_deaths
end

-- Whether a queued job may join a process that runs or has reserved the jobs `held_ids`. Jobs with at most one crash may
-- always join. A restricted job waits until all unrestricted jobs that were in flight in a crash have proven themselves,
-- so that streams make progress between two crashes; and at most half of its cohort may be in one process unproven.
local function may_join(id, held_ids)
  if tonumber(redis.call('HGET', K.JOB .. id, 'suspicion') or 0) < RESTRICTED_FROM then
    return true
  end
  local together, limit = 1, read_suspect(id).max_together
  for _, held_id in ipairs(held_ids) do
    local held = read_suspect(held_id)
    if held.restricted then
      together, limit = together + 1, math.min(limit, held.max_together)
    elseif held.suspicion > 0 and not held.proven then
      return false
    end
  end
  return together <= limit
end
