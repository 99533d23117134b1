-- The next job of a model for a worker, as a new attempt. Those before it whose time is over end here.
-- ARGV: model, worker
-- Returns the record as name, value, … ; 'no lease' ; 'alone' when the worker must first be done with what it holds;
-- or nothing when no job waits.
local model, worker = ARGV[1], ARGV[2]

local lease = redis.call('ZSCORE', K.LEASES, worker)
if not lease or tonumber(lease) <= now() then
  return 'no lease'
end
-- A job that one more loss would fail runs alone: if it kills the worker, it takes no neighbour with it.
local held = redis.call('SMEMBERS', K.RUNNING .. worker)
if #held == 1 and redis.call('HGET', K.JOB .. held[1], 'alone') then
  return 'alone'
end
while true do
  local head = redis.call('ZRANGE', K.QUEUE .. model, 0, 0, 'WITHSCORES')
  if #head == 0 then
    return false
  end
  local id, job = head[1], K.JOB .. head[1]
  local status, class, started, end_by, alone =
    unpack(redis.call('HMGET', job, 'status', 'class', 'started_at', 'end_by', 'alone'))
  local due = redis.call('ZSCORE', K.TIMERS, id)
  if status == 'queued' and due and tonumber(due) <= now() then
    finish(id, 'expired', {})
  elseif status == 'queued' and alone and #held > 0 then
    return 'alone'
  elseif status == 'queued' then
    local at = now()
    reach_turn(model, class, tonumber(head[2]) - tonumber(class) * CLASS_WIDTH)
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
  else
    leave_line(id, model) -- a record that has gone
  end
end
