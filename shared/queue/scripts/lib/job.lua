-- What the scripts share: the clock, the log, and the moves of a job between its states.
-- A job is only ever changed by these functions.

-- Scores of a waiting job: the class comes first, the fair turn inside it second. Turn 0 is the front.
local CLASS_WIDTH = 1e12
-- A record tells of so many attempts, the newest. Only one that is handed back again and again has more.
local ATTEMPTS_KEPT = 20

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function stamp(seconds)
  return string.format('%.6f', seconds)
end

-- Writes event n of the job's log and hands a copy to whoever listens. `data` is JSON.
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

-- Puts a job at `turn` of its class. Turns are handed out by start-time fair queueing: an owner's next turn
-- follows both the owner's last and the turn the class has reached, so one owner's hundred jobs and another's
-- one alternate instead of queueing behind each other.
local function wait_in_line(id, model, class, turn)
  redis.call('ZADD', K.QUEUE .. model, tonumber(class) * CLASS_WIDTH + turn, id)
end

local function next_turn(model, class, owner)
  local clock = K.CLOCK .. model
  local reached = tonumber(redis.call('HGET', clock, class) or '0')
  local last = tonumber(redis.call('HGET', clock, class .. ':' .. owner) or '0')
  local turn = math.max(reached, last) + 1
  redis.call('HSET', clock, class .. ':' .. owner, turn)
  return turn
end

local function reach_turn(model, class, turn)
  local reached = tonumber(redis.call('HGET', K.CLOCK .. model, class) or '0')
  if turn > reached then -- a job sent back to the front has turn 0
    redis.call('HSET', K.CLOCK .. model, class, turn)
  end
end

local function leave_line(id, model)
  redis.call('ZREM', K.QUEUE .. model, id)
  if redis.call('EXISTS', K.QUEUE .. model) == 0 then
    redis.call('DEL', K.CLOCK .. model)
  end
end

-- The attempt under way is over, and the history says how that came: 'worker_lost', 'handed_back' or 'ended'.
local function end_attempt(id, worker, how)
  local job = K.JOB .. id
  local n, began, started = unpack(redis.call('HMGET', job, 'attempt', 'claimed_at', 'started_at'))
  local entry = {worker = worker, started_at = began or started, ended_at = stamp(now()), how = how}
  redis.call('HSET', job, 'worker', '', 'attempt:' .. n, cjson.encode(entry))
  redis.call('HDEL', job, 'attempt:' .. tonumber(n) - ATTEMPTS_KEPT)
  redis.call('SREM', K.RUNNING .. worker, id)
end

-- The text of a job's log and its number of tokens; nothing when events are missing in it. Some 1.5 ms for 1000 chunks.
local function written(id)
  local entries = redis.call('XRANGE', K.LOG .. id, '-', '+')
  if #entries ~= tonumber(redis.call('HGET', K.JOB .. id, 'seq')) then
    return nil
  end
  local text, tokens = {}, 0
  for _, entry in ipairs(entries) do
    local _, event, _, data, _, ids = unpack(entry[2]) -- as write_event puts them
    if event == 'chunk' then
      text[#text + 1] = cjson.decode(data).text
    end
    if ids then
      tokens = tokens + select(2, ids:gsub(',', '')) + 1
    end
  end
  return table.concat(text), tokens
end

-- Why an expired job is, as code and sentence. The code says what became of it: nothing ever, or something that was
-- cut off. The sentence names the limit: before the first start, the earlier one of two.
local function out_of_time(id)
  local created, started, end_by = unpack(redis.call('HMGET', K.JOB .. id, 'created_at', 'started_at', 'end_by'))
  local due = started and end_by or redis.call('ZSCORE', K.TIMERS, id) or end_by
  local limit = tonumber(due) < tonumber(end_by) and 'start_within_s' or 'deadline_s'
  local seconds = string.format('%.3f', due - created):gsub('%.?0+$', '')
  local verb = started and 'end' or 'start'
  return started and 'deadline_exceeded' or 'start_timeout',
    string.format('The job did not %s within %s s (%s).', verb, seconds, limit)
end

-- The one way into a terminal state. `fields` are record fields to set with it, by name; without a text among them,
-- the text is what the log has.
local function finish(id, status, fields)
  local job = K.JOB .. id
  local at = now()
  local model, worker, retention, log_retention, owner, idem, started = unpack(redis.call('HMGET', job,
    'model', 'worker', 'retention_s', 'log_retention_s', 'owner', 'idempotency_key', 'started_at'))
  if not fields.text then
    fields.text, fields.completion_tokens = written(id)
  end
  if status == 'expired' then
    fields.error_code, fields.error_message = out_of_time(id)
  end
  local set = {'status', status, 'finished_at', stamp(at)}
  for name, value in pairs(fields) do
    set[#set + 1] = name
    set[#set + 1] = value
  end
  redis.call('HSET', job, unpack(set))
  leave_line(id, model)
  redis.call('ZREM', K.TIMERS, id)
  redis.call('UNLINK', K.IMAGES .. id)
  if worker and worker ~= '' then
    end_attempt(id, worker, 'ended')
  end
  emit(id, 'done', '{"status":"' .. status .. '"}')
  redis.call('EXPIRE', job, retention)
  redis.call('EXPIRE', K.LOG .. id, log_retention or retention)
  if idem and idem ~= '' then
    redis.call('EXPIRE', K.IDEM .. owner .. ':' .. idem, retention)
  end
  redis.call('HINCRBY', K.ENDED, model .. ':' .. status, 1)
  if status == 'succeeded' and started and started ~= '' then
    local took = at - tonumber(started)
    local mean = tonumber(redis.call('HGET', K.SPEED .. model, 'mean_s') or took)
    redis.call('HSET', K.SPEED .. model, 'mean_s', stamp(0.9 * mean + 0.1 * took))
  end
end

-- A running job goes back to the front of its class, and the next claim makes it the next attempt; one that was
-- asked to stop meanwhile ends instead. `how` its attempt ended is why it waits. Returns whether it waits again.
local function requeue(id, worker, how)
  local job = K.JOB .. id
  local model, class, stop = unpack(redis.call('HMGET', job, 'model', 'class', 'stop_as'))
  end_attempt(id, worker, how)
  if stop then
    finish(id, stop, {})
    return false
  end
  redis.call('HSET', job, 'status', 'queued')
  wait_in_line(id, model, class, 0)
  emit(id, 'queued', '{"reason":"' .. how .. '"}')
  return true
end

-- What the history has of losses, as a sentence's end.
local function losses_told(id)
  local job = K.JOB .. id
  local newest = tonumber(redis.call('HGET', job, 'attempt'))
  local told = {}
  for n = math.max(1, newest - ATTEMPTS_KEPT + 1), newest do
    local entry = redis.call('HGET', job, 'attempt:' .. n)
    local attempt = entry and cjson.decode(entry)
    if attempt and attempt.how == 'worker_lost' then
      told[#told + 1] = string.format('attempt %d after %.1f s', n, attempt.ended_at - attempt.started_at)
    end
  end
  return table.concat(told, ', ')
end

-- A running job was lost by its worker: it waits again, or has failed when that was once too often. Returns whether it
-- waits again.
local function lose(id, worker, most_losses)
  local job = K.JOB .. id
  local losses = redis.call('HINCRBY', job, 'losses', 1)
  if losses >= most_losses and redis.call('HEXISTS', job, 'stop_as') == 0 then
    end_attempt(id, worker, 'worker_lost')
    finish(id, 'failed', {error_code = 'worker_lost', error_message = string.format(
      'The job was lost with its worker %d %s: %s.', losses, losses == 1 and 'time' or 'times', losses_told(id))})
    return false
  end
  if not requeue(id, worker, 'worker_lost') then
    return false
  end
  if losses == most_losses - 1 then
    redis.call('HSET', job, 'alone', 1)
  end
  return true
end

-- A worker gives a running job up, as a loss when `most_losses` is given. Returns whether it waits again.
local function hand_back(id, worker, most_losses)
  if most_losses then
    return lose(id, worker, most_losses)
  end
  return requeue(id, worker, 'handed_back')
end

-- A worker has gone: its lease, its card, and what it held.
local function forget_worker(worker)
  redis.call('DEL', K.RUNNING .. worker, K.WORKER .. worker, K.EMPTYING .. worker)
  redis.call('ZREM', K.LEASES, worker)
  redis.call('HDEL', K.GRACE, worker)
end
