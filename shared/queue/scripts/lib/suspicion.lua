-- Finds the job to blame for the deaths of worker processes. Jobs are suspected by how often they were in flight when a
-- process died. Only those that were in flight at two deaths in a row are kept apart, in halves; no job runs alone.
--
-- Fields of a job's hot record:
--   suspicion     deaths in a row in which the job was in flight without having proven itself in between
--   patience      events that an attempt must write for the job to be proven in it; doubles whenever a proven job's
--                 process dies; otherwise a job that kills after N tokens of each attempt would always count as proven
--   cohort        how many jobs shared the blame for its last death
--   deaths        deaths in a row with this job as the only suspect; counts half when other jobs had just started as well
--   admitted_seq  number of the event that began the present attempt; each later event has at least one token
--
-- Simulated with 24 rows beside one poison job (tests/unit/shared/test_suspicion.py): it fails after 3 + 1 + log2(rows) deaths at
-- most, and no other job fails. Jobs with an alibi must take some suspicion as well. Otherwise a job that was suspected
-- before the poison job arrived would be blamed for the deaths that the poison job causes.

local FIRST_PATIENCE = 8
local RESTRICTED_FROM = 2

local function read_suspect(id)
  local suspicion, patience, cohort, status, seq, admitted = unpack(redis.call('HMGET', K.JOB .. id,
    'suspicion', 'patience', 'cohort', 'status', 'seq', 'admitted_seq'))
  local job = {id = id, suspicion = tonumber(suspicion or 0), patience = tonumber(patience or FIRST_PATIENCE)}
  local progress = status == 'running' and tonumber(seq) - tonumber(admitted or seq) or 0
  job.proven = progress >= job.patience
  job.restricted = job.suspicion >= RESTRICTED_FROM and not job.proven
  job.most_together = math.max(1, math.floor(tonumber(cohort or 2) / 2))
  return job
end

-- One job's share in a death. `weight` is what the death counts for a sole suspect, 0 when there are several.
local function accuse(job, cohort, weight, is_suspect)
  local suspicion, patience = job.suspicion + 1, job.patience
  if job.proven then
    suspicion, patience = 1, 2 * patience
    redis.call('HDEL', K.JOB .. job.id, 'deaths')
  elseif weight > 0 and not is_suspect then
    -- The sole suspect may be the wrong one: jobs that started beside it are kept apart from it next time.
    suspicion = math.max(RESTRICTED_FROM, suspicion)
  end
  redis.call('HSET', K.JOB .. job.id, 'suspicion', suspicion, 'patience', patience, 'cohort', cohort)
  if weight > 0 and is_suspect then
    redis.call('HINCRBYFLOAT', K.JOB .. job.id, 'deaths', tostring(weight))
  end
end

-- Applies the death of a process to the jobs that were in flight. Must be called before their attempts are ended.
-- Returns the suspects: the restricted ones if there were any, else all.
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

-- Whether a job was the only suspect of `most` deaths in a row.
local function deaths_exceeded(id, most)
  return tonumber(redis.call('HGET', K.JOB .. id, 'deaths') or 0) >= most
end

-- Whether a waiting job may join a process that holds (runs or has reserved) these jobs. Jobs that have been in flight at
-- no more than one death always may. A restricted one waits until those that were at a death have proven themselves, so
-- that streams advance between two deaths; and no more than half of a cohort may be in a process unproven.
local function may_join(id, held_ids)
  if tonumber(redis.call('HGET', K.JOB .. id, 'suspicion') or 0) < RESTRICTED_FROM then
    return true
  end
  local together, most = 1, read_suspect(id).most_together
  for _, held_id in ipairs(held_ids) do
    local held = read_suspect(held_id)
    if held.restricted then
      together, most = together + 1, math.min(most, held.most_together)
    elseif held.suspicion > 0 and not held.proven then
      return false
    end
  end
  return together <= most
end
