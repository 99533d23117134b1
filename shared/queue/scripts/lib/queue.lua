-- The queues of the models: turns, places, parked jobs, and how fast jobs start. Needs lib/clock.lua.

local CLASS_WIDTH = 1e12 -- score in a queue = class * CLASS_WIDTH + turn; turn 0 is the front of the class

-- Parked jobs -----------------------------------------------------------------------------------------------------

-- If an owner has reached its limit on running jobs, claims take its next jobs out of the queue. Otherwise they
-- would collect at its front, and a claim would have to pass thousands of them to find a job that may run.

-- Returns the numbers of parked jobs of a model by owner.
local function parked_counts(model)
  local counts, prefix = {}, model .. ' '
  local flat = redis.call('HGETALL', K.PARKED_COUNTS)
  for i = 1, #flat, 2 do
    if flat[i]:sub(1, #prefix) == prefix and not flat[i]:find(' ', #prefix + 1, true) then
      counts[flat[i]:sub(#prefix + 1)] = tonumber(flat[i + 1])
    end
  end
  return counts
end

local function has_parked(model, owner)
  return redis.call('HEXISTS', K.PARKED_COUNTS, model .. ' ' .. owner) == 1
end

local function count_parked(model, owner, change)
  local field = model .. ' ' .. owner
  if redis.call('HINCRBY', K.PARKED_COUNTS, field, change) <= 0 then
    redis.call('HDEL', K.PARKED_COUNTS, field)
  end
end

local function park(id, model, owner)
  local score = redis.call('ZSCORE', K.QUEUE .. model, id)
  if score and redis.call('ZREM', K.QUEUE .. model, id) == 1 then
    redis.call('ZADD', K.PARKED .. model .. ':' .. owner, score, id)
    count_parked(model, owner, 1)
  end
end

-- Returns up to `count` parked jobs of an owner to their places in the queue.
local function unpark(model, owner, count)
  local key = K.PARKED .. model .. ':' .. owner
  local parked = redis.call('ZRANGE', key, 0, count - 1, 'WITHSCORES')
  for i = 1, #parked, 2 do
    redis.call('ZREM', key, parked[i])
    count_parked(model, owner, -1)
    if redis.call('HGET', K.JOB .. parked[i], 'status') == 'queued' then
      redis.call('ZADD', K.QUEUE .. model, parked[i + 1], parked[i])
    else -- a process of an earlier version has ended the job
      redis.call('HINCRBY', K.QUEUED .. model, owner, -1)
    end
  end
  return #parked / 2
end

-- Removes a job from the parked ones; returns whether it was among them.
local function leave_parked(id, model)
  if redis.call('EXISTS', K.PARKED_COUNTS) == 0 then
    return false
  end
  local owner = redis.call('HGET', K.JOB .. id, 'owner')
  if not owner or redis.call('ZREM', K.PARKED .. model .. ':' .. owner, id) == 0 then
    return false
  end
  count_parked(model, owner, -1)
  return true
end

-- Returns the place of a job: its 0-based rank in the queue, the number of jobs of higher classes, the turns until its own,
-- and 0; or, if it is parked, its rank among the owner's own waiting jobs, 0, '0', and the owner's limit of running jobs.
-- {} if it is not queued.
local function queue_place(id, model, owner, class)
  local rank = redis.call('ZRANK', K.QUEUE .. model, id)
  if rank then
    local first = class * CLASS_WIDTH
    local turn = tonumber(redis.call('ZSCORE', K.QUEUE .. model, id)) - first
    local reached = tonumber(redis.call('HGET', K.TURNS .. model, class) or '0')
    return {rank, redis.call('ZCOUNT', K.QUEUE .. model, '-inf', first - 1),
      stamp(math.max(0, turn - reached)), 0}
  end
  rank = redis.call('ZRANK', K.PARKED .. model .. ':' .. owner, id)
  if not rank then
    return {}
  end
  local queued = tonumber(redis.call('HGET', K.QUEUED .. model, owner) or '0')
  local parked = tonumber(redis.call('HGET', K.PARKED_COUNTS, model .. ' ' .. owner) or '0')
  return {rank + math.max(0, queued - parked), 0, '0', tonumber(redis.call('HGET', K.MAX_RUNNING, owner) or '1')}
end

local function queue_length(model)
  local length = redis.call('ZCARD', K.QUEUE .. model)
  for _, count in pairs(parked_counts(model)) do
    length = length + count
  end
  return length
end

-- Turns and places -------------------------------------------------------------------------------------------------

-- Start-time fair queueing: an owner's next turn comes after the owner's last turn and after the turn that the class has
-- reached. So an owner with one job does not wait for all jobs of an owner with a hundred. Of two owners that always have
-- waiting jobs, one with twice the weight has twice as many turns. Turns below 1 are for jobs that return to the queue.
local function next_turn(model, class, owner, weight)
  local turns = K.TURNS .. model
  local reached, last = unpack(redis.call('HMGET', turns, class, class .. ':' .. owner))
  local turn = math.max(tonumber(reached or '0'), tonumber(last or '0'), 1) + 1 / weight
  redis.call('HSET', turns, class .. ':' .. owner, string.format('%.3f', turn))
  return turn
end

-- Lets a class reach a turn; returns by how much it advances. A job that returned to the front has turn 0.
local function reach_turn(model, class, turn)
  local reached = tonumber(redis.call('HGET', K.TURNS .. model, class) or '0')
  if turn <= reached then
    return 0
  end
  redis.call('HSET', K.TURNS .. model, class, string.format('%.3f', turn))
  return reached > 0 and turn - reached or 0 -- the first turn of a queue says nothing about its speed
end

-- Counts the queued jobs of each owner anew. The counts are missing, or have drifted, if older processes use the queue.
local function recount_queue(model)
  local counts = {}
  for _, id in ipairs(redis.call('ZRANGE', K.QUEUE .. model, 0, -1)) do
    local owner = redis.call('HGET', K.JOB .. id, 'owner')
    if owner then
      counts[owner] = (counts[owner] or 0) + 1
    end
  end
  for owner, count in pairs(parked_counts(model)) do
    counts[owner] = (counts[owner] or 0) + count
  end
  redis.call('DEL', K.QUEUED .. model)
  for owner, count in pairs(counts) do
    redis.call('HSET', K.QUEUED .. model, owner, count)
  end
  redis.call('HSET', K.QUEUED .. model, 'counted_at', stamp(now()))
end

local function count_queued(id, model, change)
  local owner = redis.call('HGET', K.JOB .. id, 'owner')
  if owner and redis.call('HINCRBY', K.QUEUED .. model, owner, change) <= 0 then
    redis.call('HDEL', K.QUEUED .. model, owner)
  end
end

local function join_queue(id, model, class, turn)
  if redis.call('ZADD', K.QUEUE .. model, tonumber(class) * CLASS_WIDTH + turn, id) == 1 then
    count_queued(id, model, 1)
  end
end

local function leave_queue(id, model)
  if redis.call('ZREM', K.QUEUE .. model, id) == 1 or leave_parked(id, model) then
    count_queued(id, model, -1)
  end
  if redis.call('EXISTS', K.QUEUE .. model, K.PARKED_COUNTS) == 0 then
    redis.call('DEL', K.TURNS .. model, K.QUEUED .. model)
  end
end

local STARTS_KEPT = 128

-- Measures how fast a class of a model's jobs starts while others of that class wait. K.SPEED..model has, per class, the
-- number of starts, the turns by which the class advanced, their seconds, and the time of the last start if jobs were
-- waiting then. The numbers are halved now and then, so that they describe the last starts. `advance`: what `reach_turn`
-- returned.
local function measure_start(model, class, advance)
  local speed, at = K.SPEED .. model, now()
  local names = {'starts:' .. class, 'turns:' .. class, 'seconds:' .. class, 'since:' .. class}
  local starts, turns, seconds, since = unpack(redis.call('HMGET', speed, unpack(names)))
  local first = class * CLASS_WIDTH
  local waits = redis.call('ZCOUNT', K.QUEUE .. model, first, first + CLASS_WIDTH - 1) > 0
  if since then
    local share = tonumber(starts or '0') >= STARTS_KEPT and 0.5 or 1
    redis.call('HSET', speed, names[1], (tonumber(starts or '0') + 1) * share,
      names[2], stamp((tonumber(turns or '0') + advance) * share),
      names[3], stamp((tonumber(seconds or '0') + math.max(0, at - tonumber(since))) * share),
      names[4], waits and stamp(at) or since)
  elseif waits then
    redis.call('HSET', speed, names[4], stamp(at))
  end
  if since and not waits then
    redis.call('HDEL', speed, names[4])
  end
end

