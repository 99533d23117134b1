-- The job log, and every transition between a job's states. Jobs change only through these functions. Needs lib/clock.lua,
-- lib/usage.lua, lib/events.lua and lib/queue.lua.
--
-- The hash K.JOB..id holds a job's state. The request with its token ids, the images and the text have their own keys
-- (see shared/redis/keys.py), so that polling and listing do not read them.
--
-- Transitions: reserve (a claim sets `worker` and `claimed_at`; the job keeps its place in the queue) → admit (the job
-- joins the worker's batch: it becomes `running`, gets the next attempt number and leaves the queue) → finish, or requeue.
--
-- Invariants:
-- * A job is in exactly one of these: K.QUEUE or K.PARKED of its owner (status `queued`), K.RUNNING of one worker
--   (`running`), none (it has ended). A reserved job is in K.QUEUE and in K.RESERVED of one worker.
-- * Events are numbered from 1 without gaps; `seq` is the number of the last one. The terminal event is the last event.
-- * K.BYTES counts each unfinished job exactly once.

local MAX_ATTEMPTS_KEPT = 20 -- newest attempts in a record; only a job that is handed back very often has more

-- Redis disconnects subscribers that have not read 32 MB (client-output-buffer-limit), and the results of an embedding job
-- can have that size. Readers find an event that was not published in the log: the next one leaves a gap.
local MAX_PUBLISHED_BYTES = 2 ^ 18

-- Appends event n to a job's log and publishes a copy, unless it is large. `data` is JSON, `tokens` is 'a,b,c' or ''.
local function write_event(id, n, event, data, tokens)
  local entry = {'e', event, 'd', data}
  if tokens ~= '' then
    entry[5], entry[6] = 't', tokens
  end
  redis.call('XADD', K.LOG .. id, n .. '-0', unpack(entry))
  redis.call('HSET', K.JOB .. id, 'seq', n)
  if #data <= MAX_PUBLISHED_BYTES then
    redis.call('PUBLISH', K.LIVE .. id, n .. ' ' .. event .. ' ' .. data)
  end
end

-- Appends the next event to a job's log.
local function emit(id, event, data)
  local last = tonumber(redis.call('HGET', K.JOB .. id, 'seq') or '0')
  write_event(id, last + 1, event, data, '')
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

-- Starts an attempt: a reserved job joins the batch of the worker that holds it.
local function admit(id)
  local job = K.JOB .. id
  local worker, model, class, end_by, started = unpack(redis.call('HMGET', job,
    'worker', 'model', 'class', 'end_by', 'started_at'))
  local at = stamp(now())
  local score = redis.call('ZSCORE', K.QUEUE .. model, id)
  local advance = score and reach_turn(model, class, tonumber(score) - tonumber(class) * CLASS_WIDTH) or 0
  leave_queue(id, model)
  measure_start(model, class, advance)
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

-- Ends the current attempt and records it. `how` is 'worker_lost', 'handed_back' or 'ended'.
local function end_attempt(id, worker, how)
  local job = K.JOB .. id
  local n, admitted, claimed, started, model = unpack(redis.call('HMGET', job,
    'attempt', 'admitted_at', 'claimed_at', 'started_at', 'model'))
  local entry = {worker = worker, started_at = admitted or claimed or started, ended_at = stamp(now()), how = how}
  redis.call('HSET', job, 'worker', '', 'attempt:' .. n, cjson.encode(entry))
  redis.call('HDEL', job, 'attempt:' .. tonumber(n) - MAX_ATTEMPTS_KEPT, 'admitted_at')
  redis.call('SREM', K.RUNNING .. worker, id)
  redis.call('HINCRBY', K.ATTEMPTS, model .. ':' .. how, 1)
end

-- The number of tokens in a job's log. Takes about 1 ms per 1,000 events.
local function tokens_in_log(id)
  local count = 0
  for _, entry in ipairs(redis.call('XRANGE', K.LOG .. id, '-', '+')) do
    local ids = entry[2][6] -- the field order is that of write_event
    if ids then
      count = count + select(2, ids:gsub(',', '')) + 1
    end
  end
  return count
end

-- The error code and message of an expired job. The message names the limit that it exceeded.
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

-- Fields of K.BYTES: what unfinished jobs occupy plus what they may grow by, in all ('total') and per owner ('owner:…');
-- the growth alone ('growth'); kept requests of ended jobs ('failed'), their limit ('failed_limit'), and whether those of
-- all jobs are kept ('keep_all'), not only of failed ones; requests kept for the archive ('unarchived'), and what the
-- archive stores ('archive': 'all', 'output' or 'none'), if there is one.
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
    if growth then -- jobs of the first layout have none
      count_bytes('growth', -growth)
    end
    redis.call('HDEL', K.JOB .. id, 'bytes', 'growth_bytes')
  end
end

local function drop_failed_request(member)
  local id, bytes = member:match('^(.+) (%d+)$')
  redis.call('UNLINK', K.REQUEST .. id, K.IMAGES .. id)
  if redis.call('ZREM', K.FAILED, member) == 1 then
    count_bytes('failed', -tonumber(bytes))
  end
end

-- Keeps the request of a failed job, with its images, so that it can be read and run again. Drops the oldest such requests
-- beyond the limit. Deletes the requests of jobs that ended otherwise, unless all are to be kept, or the archive needs
-- this one. Returns the bytes of a request that is kept only for the archive, else 0.
local function settle_request(id, status, retention, for_archive)
  local bytes = redis.call('HGET', K.JOB .. id, 'request_bytes') or '0'
  if status ~= 'failed' and redis.call('HEXISTS', K.BYTES, 'keep_all') == 0 then
    local kept_bytes = for_archive and tonumber(bytes) or 0
    redis.call('UNLINK', K.IMAGES .. id)
    if kept_bytes == 0 then
      redis.call('UNLINK', K.REQUEST .. id)
    end
    return kept_bytes
  end
  local limit = tonumber(redis.call('HGET', K.BYTES, 'failed_limit') or 2 ^ 26)
  redis.call('EXPIRE', K.REQUEST .. id, retention)
  redis.call('EXPIRE', K.IMAGES .. id, retention)
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
  return 0
end

-- The archive -----------------------------------------------------------------------------------------------------

-- Ended jobs wait in K.UNARCHIVED until the background process has copied them to the archive. The list is bounded. Jobs
-- that are dropped from it lose their request, but are archived later if their record still exists.
local MAX_UNARCHIVED = 10000
local MAX_UNARCHIVED_BYTES = 2 ^ 26
local ARCHIVE_WAIT_S = 3600 -- shortest lifetime of a record that has not been archived

-- Removes an entry from the list, with the request that was kept for it.
local function drop_unarchived(member)
  local id, bytes = member:match('^(.+) (%d+)$')
  if redis.call('ZREM', K.UNARCHIVED, member) == 1 and bytes ~= '0' then
    redis.call('UNLINK', K.REQUEST .. id)
    count_bytes('unarchived', -tonumber(bytes))
  end
end

-- Lists a job that has ended for the archive. Returns the seconds for which its record must live.
local function await_archive(id, at, request_bytes, retention)
  redis.call('ZADD', K.UNARCHIVED, stamp(at), id .. ' ' .. string.format('%.0f', request_bytes))
  if request_bytes > 0 then
    redis.call('EXPIRE', K.REQUEST .. id, math.max(retention, ARCHIVE_WAIT_S))
    count_bytes('unarchived', request_bytes)
  end
  while redis.call('ZCARD', K.UNARCHIVED) > MAX_UNARCHIVED
    or tonumber(redis.call('HGET', K.BYTES, 'unarchived') or '0') > MAX_UNARCHIVED_BYTES do
    local oldest = redis.call('ZRANGE', K.UNARCHIVED, 0, 0)[1]
    if not oldest then
      redis.call('HDEL', K.BYTES, 'unarchived')
      break
    end
    drop_unarchived(oldest)
  end
  return math.max(retention, ARCHIVE_WAIT_S)
end

-- Makes an owner's list of jobs live for at least this long: as long as the longest-lived job in it.
local function keep_owner(owner, seconds)
  if redis.call('TTL', K.OWNER .. owner) < seconds then
    redis.call('EXPIRE', K.OWNER .. owner, math.ceil(seconds))
  end
end

-- Ends ------------------------------------------------------------------------------------------------------------

-- The tokens to count for a job that ends: those that its worker reports, else those in its request and its log. Further
-- choices of a request repeat the prompt of the first one, which counts once.
local function used_tokens(id, fields, unreported, repeats_prompt)
  local prompt, cached = fields.prompt_tokens, fields.cached_tokens
  if unreported then
    prompt = math.floor(redis.call('HSTRLEN', K.REQUEST .. id, 'tokens') * 3 / 16) -- base64 of 32-bit integers
  end
  if repeats_prompt then
    prompt, cached = 0, 0
  end
  return {prompt = prompt, cached = cached, completion = fields.completion_tokens, reasoning = fields.reasoning_tokens}
end

-- Ends a job; the only transition to a terminal state. `fields`: further record fields to set. `by_worker`: whether the
-- worker that runs the job ends it; all other ends are reported for task events.
local function finish(id, status, fields, by_worker)
  local job = K.JOB .. id
  local at = now()
  local model, worker, was, retention, log_retention, owner, idem, started, hook, response, charged, repeats_prompt =
    unpack(redis.call('HMGET', job, 'model', 'worker', 'status', 'retention_s', 'log_retention_s', 'owner',
      'idempotency_key', 'started_at', 'webhook', 'response', 'charged', 'repeats_prompt'))
  if started and not fields.completion_tokens then
    fields.completion_tokens = tokens_in_log(id)
  end
  if status == 'expired' then
    fields.error_code, fields.error_message = expiry_error(id)
  end
  local record = {'status', status, 'finished_at', stamp(at)}
  for name, value in pairs(fields) do
    record[#record + 1] = name
    record[#record + 1] = value
  end
  redis.call('HSET', job, unpack(record))
  local tokens = used_tokens(id, fields, started and not by_worker, repeats_prompt)
  count_usage(owner, model, status, at, tokens)
  if charged then
    settle_charge(owner, tonumber(charged), tonumber(tokens.prompt or 0) + tonumber(tokens.completion or 0))
  end
  leave_queue(id, model)
  redis.call('ZREM', K.TIMERS, id)
  release_bytes(id, owner)
  local archive = hook ~= '-' and redis.call('HGET', K.BYTES, 'archive') -- lines of batches are in the batch's files
  local kept_bytes, lifetime = settle_request(id, status, retention, archive == 'all'), retention
  if archive then
    lifetime = await_archive(id, at, kept_bytes, tonumber(retention))
  end
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
  publish_event('job.' .. status, id, owner, hook)
  if response then
    publish_response(id, status, fields.finish_reason, owner, hook)
  end
  redis.call('EXPIRE', job, lifetime)
  redis.call('EXPIRE', K.OUTPUT .. id, lifetime)
  redis.call('EXPIRE', K.LOG .. id, log_retention or retention)
  if redis.call('HEXISTS', K.BYTES, 'owner:' .. owner) == 1 then
    keep_owner(owner, tonumber(lifetime))
  else -- the owner has no unfinished job, so no record outlives this one
    redis.call('EXPIRE', K.OWNER .. owner, lifetime)
  end
  if idem and idem ~= '' then
    redis.call('EXPIRE', K.IDEM .. owner .. ':' .. idem, retention)
  end
  redis.call('HINCRBY', K.ENDED, model .. ':' .. status, 1)
  redis.call('HINCRBY', K.TOKENS, owner .. ':input', fields.prompt_tokens or 0)
  redis.call('HINCRBY', K.TOKENS, owner .. ':output', fields.completion_tokens or 0)
  if status == 'succeeded' and started then
    local duration = at - tonumber(started)
    local mean = tonumber(redis.call('HGET', K.SPEED .. model, 'mean_s') or duration)
    redis.call('HSET', K.SPEED .. model, 'mean_s', stamp(0.9 * mean + 0.1 * duration))
  end
end

-- Returns a running job to the front of its class; the next attempt resumes it. A job that must stop ends instead. `how`
-- says how the attempt ended: 'worker_lost' or 'handed_back'. Returns whether the job is queued.
local function requeue(id, worker, how)
  local job = K.JOB .. id
  local model, class, stop_as = unpack(redis.call('HMGET', job, 'model', 'class', 'stop_as'))
  end_attempt(id, worker, how)
  if stop_as then
    finish(id, stop_as, {})
    return false
  end
  redis.call('HSET', job, 'status', 'queued')
  join_queue(id, model, class, 0)
  emit(id, 'queued', '{"reason":"' .. how .. '"}')
  return true
end

-- Describes the attempts whose worker was lost: 'attempt 1 after 10.0 s, attempt 3 after 2.0 s'.
local function describe_losses(id)
  local job = K.JOB .. id
  local newest = tonumber(redis.call('HGET', job, 'attempt'))
  local losses = {}
  for n = math.max(1, newest - MAX_ATTEMPTS_KEPT + 1), newest do
    local entry = redis.call('HGET', job, 'attempt:' .. n)
    local attempt = entry and cjson.decode(entry)
    if attempt and attempt.how == 'worker_lost' then
      losses[#losses + 1] = string.format('attempt %d after %.1f s', n, attempt.ended_at - attempt.started_at)
    end
  end
  return table.concat(losses, ', ')
end

-- Workers ---------------------------------------------------------------------------------------------------------

local function has_lease(worker, at)
  local expires = redis.call('ZSCORE', K.LEASES, worker)
  return expires and tonumber(expires) > at
end

-- Returns a job's status if the worker holds it, running or reserved; else false.
local function holds(id, worker)
  local status, holder = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'worker'))
  return holder == worker and (status == 'running' or status == 'queued') and status
end

-- Returns one job that a worker holds, running or reserved, to the queue. Returns the job's model if it is queued now.
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

-- Deletes a worker's lease, its state, and its sets of jobs.
local function forget_worker(worker)
  redis.call('DEL', K.RUNNING .. worker, K.RESERVED .. worker, K.WORKER .. worker)
  redis.call('ZREM', K.LEASES, worker)
  redis.call('HDEL', K.EXTENSIONS, worker)
end

-- Removes duplicates from a list of models.
local function distinct(models)
  local seen, unique = {}, {}
  for _, model in ipairs(models) do
    if not seen[model] then
      seen[model] = true
      unique[#unique + 1] = model
    end
  end
  return unique
end
