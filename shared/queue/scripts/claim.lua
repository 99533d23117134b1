-- The next job of a model for a worker, as a new attempt. Those before it whose time is over end here.
-- ARGV: model, worker, then the workers of other models in the same process
-- Returns the record as name, value, … ; 'no lease' ; 'alone' when the worker must first be done with what it holds;
-- 'left', then id, node, seconds for each job that is left to another worker and that this one is to see to: it tells
-- that node, and after so many seconds anybody; or nothing when no job waits that it may have.
local model, worker = ARGV[1], ARGV[2]
-- A call must not take long: what it does not come to, the next does.
local MOST_LOOKED_AT = 100

local lease = redis.call('ZSCORE', K.LEASES, worker)
if not lease or tonumber(lease) <= now() then
  return 'no lease'
end
-- A job that one more loss would fail runs alone: if it kills the process, it takes no neighbour with it, of no model.
-- One worker empties itself for it, and so do those beside it; the others pass it by, or all would stand still until one
-- of them happens to be empty.
local EMPTYING_MS = 5000 -- each claim that finds such a job says so again
local held = redis.call('SMEMBERS', K.RUNNING .. worker)
local function in_company()
  local count = #held
  for i = 3, #ARGV do
    count = count + redis.call('SCARD', K.RUNNING .. ARGV[i])
  end
  return count > 0
end
local function runs_one_alone(ids)
  return #ids == 1 and redis.call('HGET', K.JOB .. ids[1], 'alone')
end
if runs_one_alone(held) then
  return 'alone'
end
for i = 3, #ARGV do
  local other = ARGV[i]
  if redis.call('EXISTS', K.EMPTYING .. other) == 1 or runs_one_alone(redis.call('SMEMBERS', K.RUNNING .. other)) then
    return 'alone'
  end
end
local function emptying()
  local other = redis.call('GET', K.ALONE .. model)
  local holds = other and redis.call('ZSCORE', K.LEASES, other)
  if holds and tonumber(holds) > now() then
    return other
  end
  redis.call('SET', K.ALONE .. model, worker)
  return worker
end

-- A job whose beginning lies in another worker's cache is left to that one, once and not for long, if it is as good as
-- free. So a frozen or busy worker delays a job by no more than this, and one with the same prefix again and again
-- does not get all there is to do.
local LEFT_S = 0.2
local MOST_LEFT = 8
local AHEAD = 1 / 4 -- of its slots: so many jobs more than this worker it may hold
local MOST_KEEPERS = 3
local PREFIXES_S = 3600
local alone_here = redis.call('ZCARD', K.LEASES) == 1
local nodes = {}

-- The Celery node of a worker that jobs may be left to; false of any other.
local function node_of(other)
  if nodes[other] == nil then
    nodes[other] = false
    local holds_until, card = redis.call('ZSCORE', K.LEASES, other), redis.call('GET', K.WORKER .. other)
    if card and holds_until and tonumber(holds_until) > now() then
      local told, busy = cjson.decode(card), redis.call('SCARD', K.RUNNING .. other)
      local slots = math.min(told.slots, told.stats and told.stats.row_cap or told.slots)
      local idle = busy < slots and busy - #held <= math.max(1, slots * AHEAD)
      nodes[other] = told.model == model and told.state == 'ready' and idle and told.node
    end
  end
  return nodes[other]
end

-- A job's beginnings, the longest first, and the workers that last started a job which begins so, the newest first. A
-- mark has a place in the table, and a rest that tells it from others which fall on the same place.
local function beginnings(marks)
  local places, found = {}, {}
  for place, rest in marks:gmatch('(%x%x%x%x)(%x+)') do
    places[#places + 1] = place
    found[#found + 1] = {place = place, rest = rest, workers = {}}
  end
  for i, entry in ipairs(redis.call('HMGET', K.PREFIXES .. model, unpack(places))) do
    local rest, workers = (entry or ''):match('^(%x+)(.+)$')
    for name in (rest == found[i].rest and workers or ''):gmatch('%S+') do
      table.insert(found[i].workers, name)
    end
  end
  return found
end

-- Who has the longest beginning that anybody has who may take the job: this worker, another, or nobody.
local function keeper_of(found)
  for _, beginning in ipairs(found) do
    local keeper
    for _, name in ipairs(beginning.workers) do
      if name == worker then
        return worker
      end
      keeper = keeper or node_of(name) and name
    end
    if keeper then
      return keeper
    end
  end
end

local function keep(found)
  local entries = {}
  for _, beginning in ipairs(found) do
    local workers = {worker}
    for _, name in ipairs(beginning.workers) do
      if name ~= worker and #workers < MOST_KEEPERS then
        workers[#workers + 1] = name
      end
    end
    entries[#entries + 1] = beginning.place
    entries[#entries + 1] = beginning.rest .. ' ' .. table.concat(workers, ' ')
  end
  redis.call('HSET', K.PREFIXES .. model, unpack(entries))
  redis.call('EXPIRE', K.PREFIXES .. model, PREFIXES_S)
end

local function count(outcome)
  redis.call('HINCRBY', K.ROUTED, model .. ':' .. outcome, 1)
end

local left = {}
-- Whether a job is left to another; then it is among those in `left`.
local function leave(job)
  if #left == MOST_LEFT then
    return false
  end
  if not job.left_at then
    job.left_at = stamp(now())
    redis.call('HSET', K.JOB .. job.id, 'left_at', job.left_at)
    count('left')
  end
  local since = now() - tonumber(job.left_at)
  if since < 0 or since >= LEFT_S then -- a clock that was set back makes no job wait
    return false
  end
  job.node, job.seconds = node_of(job.keeper), stamp(LEFT_S - since)
  left[#left + 1] = job
  return true
end

-- Whether this worker has a slot for each job that it has left, beside the one that it would start before them. If not,
-- and nobody came for them, they would wait until it is done with that one.
local function has_place_for_left()
  local card = redis.call('GET', K.WORKER .. worker)
  return card and cjson.decode(card).slots - #held > #left
end

-- All that waits is left to others, and this call has used a ticket up. For each of them somebody will send one more, once
-- it is anybody's; so there are never fewer on their way than jobs wait.
local function see_to()
  local reply = {'left'}
  for _, job in ipairs(left) do
    if redis.call('HSETNX', K.JOB .. job.id, 'seen_to', 1) == 1 then
      reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = job.id, job.node, job.seconds
    end
  end
  return #reply > 1 and reply
end

local function start(found)
  local id, job, at = found.id, K.JOB .. found.id, now()
  if found.alone then
    redis.call('DEL', K.ALONE .. model, K.EMPTYING .. worker)
  end
  if not found.started and found.keeper == worker then
    count('keeper')
  elseif not found.started and found.left_at then
    count('another')
  end
  if found.beginnings then
    keep(found.beginnings)
  end
  reach_turn(model, found.class, found.score - tonumber(found.class) * CLASS_WIDTH)
  leave_line(id, model)
  local attempt = redis.call('HINCRBY', job, 'attempt', 1)
  redis.call('HSET', job, 'status', 'running', 'worker', worker, 'claimed_at', stamp(at))
  redis.call('SADD', K.RUNNING .. worker, id)
  redis.call('ZADD', K.TIMERS, found.end_by, id)
  if found.started then
    emit(id, 'resumed', '{"attempt":' .. attempt .. '}')
  else
    redis.call('HSET', job, 'started_at', stamp(at))
    emit(id, 'started', '{"attempt":' .. attempt .. '}')
  end
  return redis.call('HGETALL', job)
end

local place = 0
for _ = 1, MOST_LOOKED_AT do
  local head = redis.call('ZRANGE', K.QUEUE .. model, place, place, 'WITHSCORES')
  if #head == 0 then
    return see_to()
  end
  local job = {id = head[1], score = tonumber(head[2])}
  local status, marks
  status, job.class, job.started, job.end_by, job.alone, marks, job.left_at = unpack(redis.call('HMGET', K.JOB .. job.id,
    'status', 'class', 'started_at', 'end_by', 'alone', 'marks', 'left_at'))
  local due = redis.call('ZSCORE', K.TIMERS, job.id)
  job.beginnings = marks and not alone_here and beginnings(marks)
  job.keeper = job.beginnings and not job.alone and keeper_of(job.beginnings)
  if status ~= 'queued' then
    leave_line(job.id, model) -- a record that has gone
  elseif due and tonumber(due) <= now() then
    finish(job.id, 'expired', {})
  elseif job.alone and in_company() then
    if emptying() == worker then
      redis.call('SET', K.EMPTYING .. worker, 1, 'PX', EMPTYING_MS)
      return see_to() or 'alone'
    end
    place = place + 1
  elseif job.keeper and job.keeper ~= worker and leave(job) then
    place = place + 1
  elseif #left > 0 and not has_place_for_left() then
    return start(left[1])
  else
    return start(job)
  end
end
return see_to()
