-- Returns the ids of a job and of its children: the further choices of the same request.
local function family(id)
  local ids = {id}
  for child in (redis.call('HGET', K.JOB .. id, 'children') or ''):gmatch('%S+') do
    ids[#ids + 1] = child
  end
  return ids
end

-- Ends a queued job at once; marks a running one, so that its worker stops it. Returns 'done', 'stopping' or, if it had
-- ended before, 'ended'.
local function stop(id, stop_as)
  local status = redis.call('HGET', K.JOB .. id, 'status')
  if status == 'queued' then
    finish(id, stop_as, {})
    return 'done'
  elseif status == 'running' then
    redis.call('HSETNX', K.JOB .. id, 'stop_as', stop_as)
    return 'stopping'
  end
  return 'ended'
end
