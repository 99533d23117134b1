-- uses: affinity suspicion layout
-- Reserves waiting jobs of a model for a worker: as many as it can run now, and a few spare ones to have at hand.
-- ARGV: a JSON object with
--   model, worker
--   rows     jobs the worker can admit now, beyond those it has claimed
--   tokens   tokens of prompts and answers that its memory admits now
--   spare    jobs it may claim beyond that; less than 0 when it has too many
--   waiting  ids it has claimed and cannot admit now: other workers may take them, and jobs that are to be served before
--            them may be claimed in their stead
--   beside   all workers of its process
-- Returns 'no lease', or {now, seconds until a deferred job may be claimed or '', ids among `waiting` that it has lost,
-- then for each job: {record as name, value, …}, {request as name, value, …}, score}
local ask = cjson.decode(ARGV[1])
local model, worker, at = ask.model, ask.worker, now()
local MOST_LOOKED_AT = 200 -- a call must be short
local PAGE = 32
local STAY_S = 5 -- a job that was taken over stays for twice as long, four times after the second time, and so on

if not has_lease(worker, at) then
  return 'no lease'
end
redis.call('DEL', K.WAKE .. model)
if redis.call('EXISTS', K.OLD_QUEUE .. model) == 1 then
  adopt_queue(model, 100)
end

local lost, scores = {}, {}
for _, id in ipairs(ask.waiting) do
  local status = holds(id, worker)
  if status == 'queued' then
    redis.call('HSET', K.JOB .. id, 'spare', 1)
    scores[#scores + 1] = tonumber(redis.call('ZSCORE', K.QUEUE .. model, id))
  elseif status ~= 'running' then -- a row that was preempted waits in its worker; its job is running
    lost[#lost + 1] = id
  end
end

local held = {}
for _, name in ipairs(ask.beside) do
  for _, key in ipairs({K.RUNNING, K.RESERVED}) do
    for _, id in ipairs(redis.call('SMEMBERS', key .. name)) do
      held[#held + 1] = id
    end
  end
end

local alone = redis.call('ZCARD', K.LEASES) == 1
local cards, claimed = {}, {}
local rows, tokens, spare = ask.rows, ask.tokens, ask.spare
local again_s, deferred = nil, 0

-- How many spare jobs may still be claimed at this place in the queue: those that wait behind it do not count.
local function spare_before(score)
  local left = spare
  for _, other in ipairs(scores) do
    left = left + (other > tonumber(score) and 1 or 0)
  end
  return left
end

local function take(id, score, job, prefixes, as_spare)
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
  claimed[#claimed + 1] = {redis.call('HGETALL', K.JOB .. id), redis.call('HGETALL', K.REQUEST .. id), score}
end

-- Whether a job's prefix makes it wait for another worker; else the job's prefixes, if it has any.
local function deferred_to_another(id, job)
  if alone or not job.prefixes or job.started then
    return false, nil
  end
  local prefixes = affinity.prefixes(model, job.prefixes)
  local preferred = affinity.preferred(prefixes, worker, model, cards)
  if preferred and preferred ~= worker then
    local left_s = affinity.defer(id, model, job.deferred_at)
    if left_s then
      again_s = math.min(again_s or left_s, left_s)
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

-- Whether the job has been with its holder for so long that it may move. It may at once the first time. But two workers
-- may both take it for smaller than it is: if it moved again and again, none would keep memory free for it.
local function may_move(job)
  return job.moves == 0 or at - job.claimed_at >= STAY_S * 2 ^ job.moves
end

-- Whether no live worker holds the job, or another one only as a spare job that this worker could run now.
local function is_free(job, room)
  if job.worker == '' then
    return true
  end
  return job.worker ~= worker and (not has_lease(job.worker, at) or (job.spare and room and may_move(job)))
end

local function read_job(id)
  local status, holder, is_spare, started, hashes, deferred_at, size, claimed_at, moves = unpack(redis.call('HMGET',
    K.JOB .. id, 'status', 'worker', 'spare', 'started_at', 'prefixes', 'deferred_at', 'size', 'claimed_at', 'moves'))
  return {status = status, worker = holder or '', spare = is_spare, started = started, prefixes = hashes,
    deferred_at = deferred_at, size = tonumber(size or '0'), claimed_at = tonumber(claimed_at or '0'),
    moves = tonumber(moves or '0')}
end

-- Looks at one job. Returns whether to continue with the next, and whether this one has left the queue.
local function consider(id, score)
  local job = read_job(id)
  local due = redis.call('ZSCORE', K.TIMERS, id)
  if job.status ~= 'queued' then
    leave_queue(id, model) -- the record is gone, or an old process ended the job
    settle_foreign_end(id)
    return true, true
  elseif due and tonumber(due) <= at then
    finish(id, 'expired', {})
    return true, true
  end
  -- Each deferred job keeps a row free, so that no job of lower rank delays it further.
  local room = rows - deferred > 0 and tokens >= job.size
  if rows - deferred <= 0 and spare_before(score) <= 0 then
    return false
  elseif is_free(job, room) and may_join(id, held) then
    local wait, prefixes = deferred_to_another(id, job)
    if wait then
      deferred = deferred + 1
    elseif room or spare_before(score) > 0 then
      take(id, score, job, prefixes, not room)
    end
  end
  return true
end

local place, looked = 0, 0
local going = rows > 0 or spare + #scores > 0
while going and looked < MOST_LOOKED_AT do
  local page = redis.call('ZRANGE', K.QUEUE .. model, place, place + PAGE - 1, 'WITHSCORES')
  going = #page > 0
  for i = 1, #page, 2 do
    local gone
    going, gone = consider(page[i], page[i + 1])
    looked = looked + 1
    if not gone then
      place = place + 1
    end
    if not going then
      break
    end
  end
end
return {stamp(at), again_s and stamp(again_s) or '', lost, unpack(claimed)}
