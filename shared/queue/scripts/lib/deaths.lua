-- Returns the jobs of a dead worker process to the queue.

-- Fails a job that has been the only suspect of too many deaths. `exit` says how the process ended, or is ''.
local function fail_culprit(id, exit)
  local worker, status = unpack(redis.call('HMGET', K.JOB .. id, 'worker', 'status'))
  if status == 'running' then
    end_attempt(id, worker, 'worker_lost')
  end
  local losses = describe_losses(id)
  local message = 'This job was running each time that its worker process died' .. (losses ~= '' and ': ' .. losses or '')
  finish(id, 'failed', {error_code = 'worker_lost',
    error_message = message .. (exit ~= '' and '. Last exit: ' .. exit .. '.' or '.')})
end

-- Returns one job of a dead worker to the queue. A suspect goes behind less suspected jobs, so that these advance before
-- it may kill the next process. Returns the job's model when it waits now.
local function give_back_lost(id, worker)
  local was_running = holds(id, worker) == 'running'
  local model = give_back(id, worker, 'worker_lost')
  if model and was_running then
    local class, suspicion = unpack(redis.call('HMGET', K.JOB .. id, 'class', 'suspicion'))
    join_queue(id, model, class, math.min(999, tonumber(suspicion or 0)) / 1000)
  end
  return model
end

-- A process that was started anew has the same node, and may have announced itself before the lease of the old one lapses.
local function forget_host_of(worker)
  local card = redis.call('GET', K.WORKER .. worker)
  card = card and cjson.decode(card)
  local host = card and card.node and redis.call('GET', K.HOST .. card.node)
  if host and cjson.decode(host).pid == card.pid then
    redis.call('DEL', K.HOST .. card.node)
    redis.call('ZREM', K.HOSTS, card.node)
  end
end

-- The jobs among `ids` that these workers hold, admitted or not: a job may kill before its admission is written.
local function still_held(ids, workers)
  local mine, found = {}, {}
  for _, worker in ipairs(workers) do
    mine[worker] = true
  end
  for _, id in ipairs(ids) do
    local holder = redis.call('HGET', K.JOB .. id, 'worker')
    if holder and mine[holder] and holds(id, holder) then
      found[#found + 1] = id
    end
  end
  return found
end

-- Returns what dead workers held to the queue, and fails the job that is to blame. `in_flight` are the jobs that the
-- process was working on when it died. Returns the models that have waiting jobs now, the suspects, and those that failed.
local function bury(workers, in_flight, most_deaths, exit)
  local suspects = suspect(still_held(in_flight, workers))
  local models, failed = {}, {}
  for _, id in ipairs(suspects) do
    if deaths_exceeded(id, most_deaths) and redis.call('HEXISTS', K.JOB .. id, 'stop_as') == 0 then
      fail_culprit(id, exit or '')
      failed[#failed + 1] = id
    end
  end
  for _, worker in ipairs(workers) do
    for _, set in ipairs({K.RESERVED, K.RUNNING}) do
      for _, id in ipairs(redis.call('SMEMBERS', set .. worker)) do
        models[#models + 1] = give_back_lost(id, worker)
      end
    end
    forget_host_of(worker)
    forget_worker(worker)
  end
  return distinct(models), suspects, failed
end
