-- The next job of a model for a worker, as a new attempt. Those before it whose time is over end here.
-- ARGV: model, worker
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
-- A job that one more loss would fail runs alone: if it kills the worker, it takes no neighbour with it. One worker
-- empties itself for it; the others pass it by, or all would stand still until one of them happens to be empty.
local held = redis.call('SMEMBERS', K.RUNNING .. worker)
if #held == 1 and redis.call('HGET', K.JOB .. held[1], 'alone') then
  return 'alone'
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
      local idle = busy < told.slots and busy - #held <= math.max(1, told.slots * AHEAD)
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
local function leave(id, keeper, left_at)
  if #left == MOST_LEFT then
    return false
  end
  if not left_at then
    left_at = stamp(now())
    redis.call('HSET', K.JOB .. id, 'left_at', left_at)
    count('left')
  end
  local since = now() - tonumber(left_at)
  if since < 0 or since >= LEFT_S then -- a clock that was set back makes no job wait
    return false
  end
  left[#left + 1] = {id = id, node = node_of(keeper), seconds = stamp(LEFT_S - since)}
  return true
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

local function start(id, class, turn, started, end_by)
  local job, at = K.JOB .. id, now()
  reach_turn(model, class, turn)
  leave_line(id, model)
  local attempt = redis.call('HINCRBY', job, 'attempt', 1)
  redis.call('HSET', job, 'status', 'running', 'worker', worker, 'claimed_at', stamp(at))
  redis.call('SADD', K.RUNNING .. worker, id)
  redis.call('ZADD', K.TIMERS, end_by, id)
  if started then
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
  local id = head[1]
  local status, class, started, end_by, alone, marks, left_at = unpack(redis.call('HMGET', K.JOB .. id,
    'status', 'class', 'started_at', 'end_by', 'alone', 'marks', 'left_at'))
  local due = redis.call('ZSCORE', K.TIMERS, id)
  local found = marks and not alone_here and beginnings(marks)
  local keeper = found and not alone and keeper_of(found)
  if status ~= 'queued' then
    leave_line(id, model) -- a record that has gone
  elseif due and tonumber(due) <= now() then
    finish(id, 'expired', {})
  elseif alone and #held > 0 then
    if emptying() == worker then
      return 'alone'
    end
    place = place + 1
  elseif keeper and keeper ~= worker and leave(id, keeper, left_at) then
    place = place + 1
  else
    if alone then
      redis.call('DEL', K.ALONE .. model)
    end
    if keeper == worker then
      count('keeper')
    elseif left_at then
      count('another')
    end
    if found then
      keep(found)
    end
    return start(id, class, tonumber(head[2]) - tonumber(class) * CLASS_WIDTH, started, end_by)
  end
end
return see_to()
