-- The next job of a model for a worker, as a new attempt. Those before it whose time is over end here.
-- ARGV: model, worker
-- Returns the record as name, value, … ; 'no lease' ; 'alone' when the worker must first be done with what it holds;
-- or nothing when no job waits.
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
    return false
  end
  local id = head[1]
  local status, class, started, end_by, alone =
    unpack(redis.call('HMGET', K.JOB .. id, 'status', 'class', 'started_at', 'end_by', 'alone'))
  local due = redis.call('ZSCORE', K.TIMERS, id)
  if status ~= 'queued' then
    leave_line(id, model) -- a record that has gone
  elseif due and tonumber(due) <= now() then
    finish(id, 'expired', {})
  elseif alone and #held > 0 then
    if emptying() == worker then
      return 'alone'
    end
    place = place + 1
  else
    if alone then
      redis.call('DEL', K.ALONE .. model)
    end
    return start(id, class, tonumber(head[2]) - tonumber(class) * CLASS_WIDTH, started, end_by)
  end
end
return false
