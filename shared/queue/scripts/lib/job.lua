-- The clock, the job log, and every transition of a job between its states. Jobs change only through these functions.
--
-- Hot state lives in the hash K.JOB..id; the request, its token ids and its images, and the text so far, have keys of
-- their own (see shared/queue/keys.py), so that polling and listing move none of them.
--
-- A claim reserves a queued job: `worker` and `claimed_at` are set, and the job keeps its place in the queue. Admission
-- to a worker's batch starts an attempt: the job becomes `running`, gets the next attempt number and leaves the queue.

-- Scores in a queue: the class comes first, the fair turn inside it second. Turn 0 is the front.
local CLASS_WIDTH = 1e12
-- A record keeps this many attempts, the newest. Only a job that is handed back again and again has more.
local ATTEMPTS_KEPT = 20
local ENDS_KEPT = 10000

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function stamp(seconds)
  return string.format('%.6f', seconds)
end

-- Writes event n of a job's log and publishes a copy. `data` is JSON, `tokens` is 'a,b,c' or ''.
local function write_event(id, n, event, data, tokens)
  local entry = {'e', event, 'd', data}
  if tokens ~= '' then
    entry[5], entry[6] = 't', tokens
  end
  redis.call('XADD', K.LOG .. id, n .. '-0', unpack(entry))
  redis.call('HSET', K.JOB .. id, 'seq', n)
  redis.call('PUBLISH', K.LIVE .. id, n .. ' ' .. event .. ' ' .. data)
end

local function emit(id, event, data)
  local last = tonumber(redis.call('HGET', K.JOB .. id, 'seq') or '0')
  write_event(id, last + 1, event, data, '')
end

-- Queues ----------------------------------------------------------------------------------------------------------

-- Start-time fair queueing: an owner's next turn follows both the owner's last turn and the turn that the class has
-- reached, so one owner's hundred jobs and another's single job alternate.
local function next_turn(model, class, owner)
  local turns = K.TURNS .. model
  local reached = tonumber(redis.call('HGET', turns, class) or '0')
  local last = tonumber(redis.call('HGET', turns, class .. ':' .. owner) or '0')
  local turn = math.max(reached, last) + 1
  redis.call('HSET', turns, class .. ':' .. owner, turn)
  return turn
end

local function reach_turn(model, class, turn)
  local reached = tonumber(redis.call('HGET', K.TURNS .. model, class) or '0')
  if turn > reached then -- a job that returned to the front has turn 0
    redis.call('HSET', K.TURNS .. model, class, turn)
  end
end

local function join_queue(id, model, class, turn)
  redis.call('ZADD', K.QUEUE .. model, tonumber(class) * CLASS_WIDTH + turn, id)
end

local function leave_queue(id, model)
  redis.call('ZREM', K.QUEUE .. model, id)
  if redis.call('EXISTS', K.QUEUE .. model) == 0 then
    redis.call('DEL', K.TURNS .. model)
  end
end

-- Reservations ----------------------------------------------------------------------------------------------------

local function reserve(id, worker, spare)
  redis.call('HSET', K.JOB .. id, 'worker', worker, 'claimed_at', stamp(now()))
  if spare then
    redis.call('HSET', K.JOB .. id, 'spare', 1)
  else
    redis.call('HDEL', K.JOB .. id, 'spare')
  end
  redis.call('SADD', K.RESERVED .. worker, id)
end

local function unreserve(id, worker)
  redis.call('SREM', K.RESERVED .. worker, id)
  redis.call('HSET', K.JOB .. id, 'worker', '')
  redis.call('HDEL', K.JOB .. id, 'spare', 'moves')
end

-- Attempts --------------------------------------------------------------------------------------------------------

-- A reserved job enters the batch of the worker that holds it.
local function admit(id)
  local job = K.JOB .. id
  local worker, model, class, end_by, started = unpack(redis.call('HMGET', job,
    'worker', 'model', 'class', 'end_by', 'started_at'))
  local at = stamp(now())
  local score = redis.call('ZSCORE', K.QUEUE .. model, id)
  if score then
    reach_turn(model, class, tonumber(score) - tonumber(class) * CLASS_WIDTH)
  end
  leave_queue(id, model)
  redis.call('SREM', K.RESERVED .. worker, id)
  redis.call('SADD', K.RUNNING .. worker, id)
  local attempt = redis.call('HINCRBY', job, 'attempt', 1)
  redis.call('HSET', job, 'status', 'running', 'admitted_at', at)
  redis.call('HDEL', job, 'spare', 'moves', 'deferred_at')
  redis.call('ZADD', K.TIMERS, end_by, id)
  if started then
    emit(id, 'resumed', '{"attempt":' .. attempt .. '}')
  else
    redis.call('HSET', job, 'started_at', at)
    emit(id, 'started', '{"attempt":' .. attempt .. '}')
  end
  redis.call('HSET', job, 'admitted_seq', redis.call('HGET', job, 'seq')) -- for suspicion.lua
end

-- The present attempt is over: 'worker_lost', 'handed_back' or 'ended'.
local function end_attempt(id, worker, how)
  local job = K.JOB .. id
  local n, admitted, claimed, started = unpack(redis.call('HMGET', job,
    'attempt', 'admitted_at', 'claimed_at', 'started_at'))
  local entry = {worker = worker, started_at = admitted or claimed or started, ended_at = stamp(now()), how = how}
  redis.call('HSET', job, 'worker', '', 'attempt:' .. n, cjson.encode(entry))
  redis.call('HDEL', job, 'attempt:' .. tonumber(n) - ATTEMPTS_KEPT, 'admitted_at')
  redis.call('SREM', K.RUNNING .. worker, id)
end

-- How many tokens a job's log holds. Takes about 1 ms per 1,000 events.
local function tokens_in_log(id)
  local count = 0
  for _, entry in ipairs(redis.call('XRANGE', K.LOG .. id, '-', '+')) do
    local ids = entry[2][6] -- as write_event writes it
    if ids then
      count = count + select(2, ids:gsub(',', '')) + 1
    end
  end
  return count
end

-- The error code and message of an expired job. The message names the limit that was reached.
local function expiry_error(id)
  local created, started, end_by = unpack(redis.call('HMGET', K.JOB .. id, 'created_at', 'started_at', 'end_by'))
  local due = started and end_by or redis.call('ZSCORE', K.TIMERS, id) or end_by
  local limit = tonumber(due) < tonumber(end_by) and 'start_within_s' or 'deadline_s'
  local seconds = string.format('%.3f', due - created):gsub('%.?0+$', '')
  local verb = started and 'end' or 'start'
  return started and 'deadline_exceeded' or 'start_timeout',
    string.format('The job did not %s within %s s (%s).', verb, seconds, limit)
end

-- Bytes -----------------------------------------------------------------------------------------------------------

-- K.BYTES counts the bytes that unfinished jobs occupy and may grow by ('total', 'owner:…'), the growth alone ('growth'),
-- and the bytes of the requests of failed jobs ('failed') with their bound ('failed_limit').
local function count_bytes(field, bytes)
  if redis.call('HINCRBY', K.BYTES, field, string.format('%.0f', bytes)) <= 0 then
    redis.call('HDEL', K.BYTES, field)
  end
end

local function release_bytes(id, owner)
  local bytes, growth = unpack(redis.call('HMGET', K.JOB .. id, 'bytes', 'growth_bytes'))
  if bytes then
    count_bytes('total', -bytes)
    count_bytes('owner:' .. owner, -bytes)
    if growth then -- not of jobs of the first layout
      count_bytes('growth', -growth)
    end
    redis.call('HDEL', K.JOB .. id, 'bytes', 'growth_bytes')
  end
end

local function drop_failed_request(member)
  local id, bytes = member:match('^(.+) (%d+)$')
  redis.call('UNLINK', K.REQUEST .. id)
  if redis.call('ZREM', K.FAILED, member) == 1 then
    count_bytes('failed', -tonumber(bytes))
  end
end

-- Requests of failed jobs are kept for inspection, the newest within a bound; all other ended jobs lose theirs.
local function settle_request(id, status, retention)
  if status ~= 'failed' then
    redis.call('UNLINK', K.REQUEST .. id)
    return
  end
  local bytes = redis.call('HGET', K.JOB .. id, 'request_bytes') or '0'
  local limit = tonumber(redis.call('HGET', K.BYTES, 'failed_limit') or 2 ^ 26)
  redis.call('EXPIRE', K.REQUEST .. id, retention)
  redis.call('ZADD', K.FAILED, stamp(now() + retention), id .. ' ' .. bytes)
  count_bytes('failed', tonumber(bytes))
  while tonumber(redis.call('HGET', K.BYTES, 'failed') or '0') > limit do
    local oldest = redis.call('ZRANGE', K.FAILED, 0, 0)[1]
    if not oldest then
      redis.call('HDEL', K.BYTES, 'failed')
      break
    end
    drop_failed_request(oldest)
  end
end

-- Extends an owner's list of jobs so that it lives as long as the longest-lived job in it.
local function keep_owner(owner, seconds)
  local left = redis.call('TTL', K.OWNER .. owner)
  if left < seconds then
    redis.call('EXPIRE', K.OWNER .. owner, math.ceil(seconds))
  end
end

-- Ends ------------------------------------------------------------------------------------------------------------

-- Ends that no worker knows of, for Celery's task events. Only the newest are kept: nothing depends on them.
local function report_end(id, model, status, fields)
  redis.call('RPUSH', K.ENDS, cjson.encode({id = id, model = model, status = status, error_code = fields.error_code,
    error_message = fields.error_message}))
  redis.call('LTRIM', K.ENDS, -ENDS_KEPT, -1)
end

-- The only way into a terminal state. `fields`: further record fields to set, by name. `by_worker`: whether the worker
-- that holds the job ends it; other ends are reported for task events.
local function finish(id, status, fields, by_worker)
  local job = K.JOB .. id
  local at = now()
  local model, worker, was, retention, log_retention, owner, idem, started = unpack(redis.call('HMGET', job,
    'model', 'worker', 'status', 'retention_s', 'log_retention_s', 'owner', 'idempotency_key', 'started_at'))
  if started and not fields.completion_tokens then
    fields.completion_tokens = tokens_in_log(id)
  end
  if status == 'expired' then
    fields.error_code, fields.error_message = expiry_error(id)
  end
  local set = {'status', status, 'finished_at', stamp(at)}
  for name, value in pairs(fields) do
    set[#set + 1] = name
    set[#set + 1] = value
  end
  redis.call('HSET', job, unpack(set))
  leave_queue(id, model)
  redis.call('ZREM', K.TIMERS, id)
  redis.call('UNLINK', K.IMAGES .. id)
  release_bytes(id, owner)
  settle_request(id, status, retention)
  if worker and worker ~= '' then
    if was == 'running' then
      end_attempt(id, worker, 'ended')
    else
      unreserve(id, worker)
    end
  end
  if not by_worker then
    report_end(id, model, status, fields)
  end
  emit(id, 'done', '{"status":"' .. status .. '"}')
  redis.call('PUBLISH', K.DONE .. id, status)
  redis.call('EXPIRE', job, retention)
  redis.call('EXPIRE', K.OUTPUT .. id, retention)
  redis.call('EXPIRE', K.LOG .. id, log_retention or retention)
  keep_owner(owner, tonumber(retention))
  if idem and idem ~= '' then
    redis.call('EXPIRE', K.IDEM .. owner .. ':' .. idem, retention)
  end
  redis.call('HINCRBY', K.ENDED, model .. ':' .. status, 1)
  if status == 'succeeded' and started then
    local took = at - tonumber(started)
    local mean = tonumber(redis.call('HGET', K.SPEED .. model, 'mean_s') or took)
    redis.call('HSET', K.SPEED .. model, 'mean_s', stamp(0.9 * mean + 0.1 * took))
  end
end

-- A running job returns to the front of its class, to be continued by the next attempt; one that was asked to stop
-- ends instead. `how` is the end of the attempt: 'worker_lost' or 'handed_back'. Returns whether the job waits again.
local function requeue(id, worker, how)
  local job = K.JOB .. id
  local model, class, stop = unpack(redis.call('HMGET', job, 'model', 'class', 'stop_as'))
  end_attempt(id, worker, how)
  if stop then
    finish(id, stop, {})
    return false
  end
  redis.call('HSET', job, 'status', 'queued')
  join_queue(id, model, class, 0)
  emit(id, 'queued', '{"reason":"' .. how .. '"}')
  return true
end

-- The attempts that ended with their worker, as the end of a sentence.
local function describe_losses(id)
  local job = K.JOB .. id
  local newest = tonumber(redis.call('HGET', job, 'attempt'))
  local described = {}
  for n = math.max(1, newest - ATTEMPTS_KEPT + 1), newest do
    local entry = redis.call('HGET', job, 'attempt:' .. n)
    local attempt = entry and cjson.decode(entry)
    if attempt and attempt.how == 'worker_lost' then
      described[#described + 1] = string.format('attempt %d after %.1f s', n, attempt.ended_at - attempt.started_at)
    end
  end
  return table.concat(described, ', ')
end

-- Workers ---------------------------------------------------------------------------------------------------------

local function has_lease(worker, at)
  local expires = redis.call('ZSCORE', K.LEASES, worker)
  return expires and tonumber(expires) > at
end

-- Whether a worker may write for a job: an attempt that was admitted, or a reservation that it still holds.
local function holds(id, worker)
  local status, holder = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'worker'))
  return holder == worker and (status == 'running' or status == 'queued') and status
end

-- Gives up one job that a worker holds, running or reserved. Returns the job's model when it waits for another worker now.
local function give_back(id, worker, how)
  local status = holds(id, worker)
  local model = redis.call('HGET', K.JOB .. id, 'model')
  if status == 'running' and requeue(id, worker, how) then
    return model
  elseif status == 'queued' then
    unreserve(id, worker)
    return model
  end
end

-- A worker is gone: its lease, its card, and its sets of jobs.
local function forget_worker(worker)
  redis.call('DEL', K.RUNNING .. worker, K.RESERVED .. worker, K.WORKER .. worker)
  redis.call('ZREM', K.LEASES, worker)
  redis.call('HDEL', K.EXTENSIONS, worker)
end

-- The models of a list, each once.
local function distinct(models)
  local seen, found = {}, {}
  for _, model in ipairs(models) do
    if not seen[model] then
      seen[model] = true
      found[#found + 1] = model
    end
  end
  return found
end
