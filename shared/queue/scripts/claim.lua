-- uses: affinity suspicion layout running
-- Reserves queued jobs of a model for a worker: as many as it can run now, and a few spare ones ahead of capacity.
-- ARGV: a JSON object with
--   model, worker
--   rows             number of jobs that the worker can admit now, in addition to those it has claimed
--   tokens           number of prompt and answer tokens that fit in its free memory
--   spare            number of jobs that it may claim ahead of capacity; negative if it holds too many
--   reserve          rows that jobs of the class `batch` leave free, so that others start at once; they are no spare jobs then
--   waiting          ids of claimed jobs that it cannot admit now: other workers may take them over, and each one that
--                    ranks behind a queued job does not count against `spare` for that job
--   process_workers  ids of all workers of its process
-- Returns 'no lease', or {time, seconds until a deferred job may be claimed or '', ids in `waiting` that the worker no
-- longer holds, then for each job: {record as name, value, …}, {request as name, value, …}, score}
--
-- Invariants: jobs are examined in queue order, and each deferred job keeps one row free, so no job of lower rank delays
-- a deferred one. A reserved job stays in the queue until it is admitted. At most one worker holds a job.
--
-- Of `TURNS_PER_CLASS` claimed jobs, one is from each lower class that waits, and it ranks before all others. So no class
-- starves. Jobs of owners that run as many as they may are parked.
local request = cjson.decode(ARGV[1])
local model, worker, at = request.model, request.worker, now()
local MAX_EXAMINED = 200 -- bounds the duration of a call
local PAGE = 32
local BATCH = 2 * CLASS_WIDTH -- lowest score of the class `batch`
local TURNS_PER_CLASS = 10
local MIN_STAY_S = 5 -- after n takeovers (n > 0), a job stays at least 2^n times this long with its worker

if not has_lease(worker, at) then
  return 'no lease'
end
redis.call('DEL', K.WAKE .. model)
if redis.call('EXISTS', K.OLD_QUEUE .. model) == 1 then
  adopt_queue(model, 100)
end

local lost, waiting_scores = {}, {}
for _, id in ipairs(request.waiting) do
  local status = holds(id, worker)
  if status == 'queued' then
    redis.call('HSET', K.JOB .. id, 'spare', 1)
    waiting_scores[#waiting_scores + 1] = tonumber(redis.call('ZSCORE', K.QUEUE .. model, id))
  elseif status ~= 'running' then -- a preempted row waits in its worker, but its job is running
    lost[#lost + 1] = id
  end
end

local held = {}
for _, name in ipairs(request.process_workers) do
  for _, key in ipairs({K.RUNNING, K.RESERVED}) do
    for _, id in ipairs(redis.call('SMEMBERS', key .. name)) do
      held[#held + 1] = id
    end
  end
end

local limited = running.limited()
if limited or redis.call('EXISTS', K.PARKED_COUNTS) == 1 then
  running.unpark(model)
end

local only_worker = redis.call('ZCARD', K.LEASES) == 1
local room_cache, claimed, classes = {}, {}, {}
local rows, tokens, spare = request.rows, request.tokens, request.spare
local again_s, deferred = nil, 0

-- How many spare jobs may be claimed at this place in the queue: waiting jobs that rank behind it do not count.
local function spare_at(score)
  local count = spare
  for _, other in ipairs(waiting_scores) do
    count = count + (other > tonumber(score) and 1 or 0)
  end
  return count
end

local function take(id, score, job, prefixes, as_spare, rank)
  if job.worker ~= '' then
    redis.call('SREM', K.RESERVED .. job.worker, id)
    redis.call('HINCRBY', K.JOB .. id, 'moves', 1)
  end
  reserve(id, worker, as_spare)
  if prefixes and #prefixes > 0 then
    affinity.remember(model, worker, prefixes)
  end
  if as_spare then
    spare = spare - 1
  else
    rows, tokens = rows - 1, tokens - job.size
  end
  held[#held + 1] = id
  classes[#classes + 1] = math.floor(tonumber(score) / CLASS_WIDTH)
  if limited then
    running.add(job.owner)
  end
  claimed[#claimed + 1] = {redis.call('HGETALL', K.JOB .. id), redis.call('HGETALL', K.REQUEST .. id), rank}
end

-- Whether a job is deferred to the worker that has its prefix cached. If not, also returns the job's prefixes.
local function is_deferred(id, job)
  if only_worker or not job.prefixes or job.started then
    return false, nil
  end
  local prefixes = affinity.prefixes(model, job.prefixes)
  local preferred = affinity.preferred(prefixes, worker, model, room_cache)
  if preferred and preferred ~= worker then
    local remaining_s = affinity.defer(id, model, job.deferred_at)
    if remaining_s then
      again_s = math.min(again_s or remaining_s, remaining_s)
      return true, nil
    end
  end
  if preferred == worker then
    affinity.count(model, 'preferred')
  elseif job.deferred_at then
    affinity.count(model, 'another')
  end
  return false, prefixes
end

-- Whether another worker may take over a job from its holder: at once the first time, later only after a time that
-- doubles. Otherwise two workers that both underestimate the job's size could exchange it forever, and neither would
-- keep memory free for it.
local function may_move(job)
  return job.moves == 0 or at - job.claimed_at >= MIN_STAY_S * 2 ^ job.moves
end

-- Whether no live worker holds the job, or another worker holds it as a spare and this worker could run it now.
local function is_free(job, has_room)
  if job.worker == '' then
    return true
  end
  return job.worker ~= worker and (not has_lease(job.worker, at) or (job.spare and has_room and may_move(job)))
end

local function read_job(id)
  local status, holder, is_spare, started, hashes, deferred_at, size, claimed_at, moves, owner = unpack(redis.call('HMGET',
    K.JOB .. id, 'status', 'worker', 'spare', 'started_at', 'prefixes', 'deferred_at', 'size', 'claimed_at', 'moves', 'owner'))
  return {owner = owner, status = status, worker = holder or '', spare = is_spare, started = started, prefixes = hashes,
    deferred_at = deferred_at, size = tonumber(size or '0'), claimed_at = tonumber(claimed_at or '0'),
    moves = tonumber(moves or '0')}
end

-- Examines one job. Returns whether to continue with the next one, and whether this one was removed from the queue.
-- `first`: whether it is the turn of its class, so that it ranks before all others.
local function examine(id, score, first)
  local job = read_job(id)
  local due = redis.call('ZSCORE', K.TIMERS, id)
  if job.status ~= 'queued' then
    leave_queue(id, model) -- the record has expired, or an old process ended the job
    settle_foreign_end(id)
    return true, true
  elseif due and tonumber(due) <= at then
    finish(id, 'expired', {})
    return true, true
  end
  local kept = not first and tonumber(score) >= BATCH and request.reserve or 0
  local has_room = rows - deferred > kept and tokens >= job.size
  local may_be_spare = kept == 0 and spare_at(score) > 0
  if rows - deferred <= kept and not may_be_spare then
    return false
  elseif limited and job.worker == '' and running.at_limit(job.owner) then
    park(id, model, job.owner)
    return true, true
  elseif is_free(job, has_room) and may_join(id, held) then
    local defer, prefixes = is_deferred(id, job)
    if defer then
      deferred = deferred + 1
    elseif has_room or may_be_spare then
      take(id, score, job, prefixes, not has_room, first and '-1' or score)
    end
  end
  return true
end

-- How many jobs of higher classes were claimed for each lower class while it waited; each of its own jobs takes away
-- `TURNS_PER_CLASS - 1`.
local passed = redis.call('HMGET', K.TURNS .. model, 'passed:1', 'passed:2')

-- Claims the jobs of lower classes whose turn it is.
local function serve_lower_classes()
  for class, count in ipairs(passed) do
    local due = math.floor((tonumber(count or '0') + rows + math.max(0, spare)) / TURNS_PER_CLASS)
    local first, before = class * CLASS_WIDTH, #claimed
    local page = due > 0 and redis.call('ZRANGEBYSCORE', K.QUEUE .. model, first,
      string.format('(%.0f', first + CLASS_WIDTH), 'WITHSCORES', 'LIMIT', 0, PAGE) or {}
    for i = 1, #page, 2 do
      if #claimed - before >= due or not examine(page[i], page[i + 1], true) then
        break
      end
    end
  end
end

local function count_passed()
  local last = redis.call('ZRANGE', K.QUEUE .. model, -1, -1, 'WITHSCORES')[2]
  local lowest = last and math.floor(tonumber(last) / CLASS_WIDTH) or 0
  for class, count in ipairs(passed) do
    local number = tonumber(count or '0')
    for _, other in ipairs(classes) do
      number = number + (other < class and 1 or other == class and 1 - TURNS_PER_CLASS or 0)
    end
    if class > lowest or number <= 0 then
      redis.call('HDEL', K.TURNS .. model, 'passed:' .. class)
    else
      redis.call('HSET', K.TURNS .. model, 'passed:' .. class, number)
    end
  end
end

local place, examined = 0, 0
local continue = rows > 0 or spare + #waiting_scores > 0
if continue then
  serve_lower_classes()
end
while continue and examined < MAX_EXAMINED do
  local page = redis.call('ZRANGE', K.QUEUE .. model, place, place + PAGE - 1, 'WITHSCORES')
  continue = #page > 0
  for i = 1, #page, 2 do
    local removed
    continue, removed = examine(page[i], page[i + 1], false)
    examined = examined + 1
    if not removed then
      place = place + 1
    end
    if not continue then
      break
    end
  end
end
if #claimed > 0 then
  count_passed()
end
return {stamp(at), again_s and stamp(again_s) or '', lost, unpack(claimed)}
