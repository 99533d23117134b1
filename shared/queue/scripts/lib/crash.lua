-- Returns the jobs of a crashed worker process to the queue. Needs lib/job.lua and lib/suspicion.lua.
--
-- Invariant: blame is assigned before any attempt is ended, because it depends on the progress of the running attempts.

-- Fails a job that was the only suspect of too many crashes. `exit_status` says how the process ended, or is ''.
local function fail_culprit(id, exit_status)
  local worker, status = unpack(redis.call('HMGET', K.JOB .. id, 'worker', 'status'))
  if status == 'running' then
    end_attempt(id, worker, 'worker_lost')
  end
  local losses = describe_losses(id)
  local message = 'This job was running each time its worker process crashed' .. (losses ~= '' and ': ' .. losses or '')
  finish(id, 'failed', {error_code = 'worker_lost',
    error_message = message .. (exit_status ~= '' and '. Last exit: ' .. exit_status .. '.' or '.')})
end

-- Returns one job of a crashed worker to the queue. A suspect is queued behind less suspected jobs, so that these make
-- progress before it may crash the next process. Returns the job's model if it is queued now.
local function give_back_lost(id, worker)
  local was_running = holds(id, worker) == 'running'
  local model = give_back(id, worker, 'worker_lost')
  if model and was_running then
    local class, suspicion = unpack(redis.call('HMGET', K.JOB .. id, 'class', 'suspicion'))
    join_queue(id, model, class, math.min(999, tonumber(suspicion or 0)) / 1000)
  end
  return model
end

-- Deletes the state of the worker's process. A restarted process has the same node name, and may have announced itself
-- before the lease of the crashed one expired; it is recognised by its pid.
local function forget_host_of(worker)
  local info = redis.call('GET', K.WORKER .. worker)
  info = info and cjson.decode(info)
  local host = info and info.node and redis.call('GET', K.HOST .. info.node)
  if host and cjson.decode(host).pid == info.pid then
    redis.call('DEL', K.HOST .. info.node)
    redis.call('ZREM', K.HOSTS, info.node)
  end
end

-- The jobs among `ids` that these workers hold, running or reserved: a job may crash its process before its admission is
-- written.
local function still_held(ids, workers)
  local is_dead, held = {}, {}
  for _, worker in ipairs(workers) do
    is_dead[worker] = true
  end
  for _, id in ipairs(ids) do
    local holder = redis.call('HGET', K.JOB .. id, 'worker')
    if holder and is_dead[holder] and holds(id, holder) then
      held[#held + 1] = id
    end
  end
  return held
end

-- Returns all jobs of crashed workers to the queue, and fails a job that has caused too many crashes. `in_flight` are the
-- jobs that the process was running. Returns the models that have queued jobs because of this, the suspects, and the jobs
-- that failed.
local function handle_crash(workers, in_flight, max_deaths, exit_status)
  local suspects = suspect(still_held(in_flight, workers))
  local models, failed = {}, {}
  for _, id in ipairs(suspects) do
    if deaths_reached(id, max_deaths) and redis.call('HEXISTS', K.JOB .. id, 'stop_as') == 0 then
      fail_culprit(id, exit_status)
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
