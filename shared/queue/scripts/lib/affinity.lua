-- Prefix affinity: defers a job to a worker that has its prefix cached (the preferred worker), for at most DEFER_S and
-- only if that worker has room. So a frozen or busy worker delays a job by at most DEFER_S, and jobs with a common prefix
-- do not all go to one worker. Needs lib/job.lua.

local DEFER_S = 0.2
local MAX_WORKERS = 3 -- stored per prefix
local REMEMBER_S = 3600
local MAX_LEAD = 1 / 4 -- how many more jobs a preferred worker may hold than the claiming one, as a share of its slots

local affinity = {}

local function count_held(worker)
  return redis.call('SCARD', K.RUNNING .. worker) + redis.call('SCARD', K.RESERVED .. worker)
end

-- Looks up a job's prefix hashes (a string, longest prefix first). Returns a list of {place, rest, workers}: `place` is
-- the field of K.PREFIXES (the first 4 digits of a hash), `rest` its other digits, and `workers` are those that recently
-- claimed a job with this prefix, newest first.
function affinity.prefixes(model, hashes)
  local places, prefixes = {}, {}
  for place, rest in hashes:gmatch('(%x%x%x%x)(%x+)') do
    places[#places + 1] = place
    prefixes[#prefixes + 1] = {place = place, rest = rest, workers = {}}
  end
  if #places == 0 then -- a newer process uses another format
    return prefixes
  end
  for i, entry in ipairs(redis.call('HMGET', K.PREFIXES .. model, unpack(places))) do
    local rest, workers = (entry or ''):match('^(%x+)(.+)$')
    for name in (rest == prefixes[i].rest and workers or ''):gmatch('%S+') do
      table.insert(prefixes[i].workers, name)
    end
  end
  return prefixes
end

-- Whether another worker could start a job now. `cache` holds the results within one call of the script.
local function has_room(other, claimer, model, cache)
  if cache[other] == nil then
    cache[other] = false
    local info = has_lease(other, now()) and redis.call('GET', K.WORKER .. other)
    if info then
      local worker, held = cjson.decode(info), count_held(other)
      local lead = held - count_held(claimer)
      cache[other] = worker.model == model and worker.state == 'ready' and held < worker.slots
        and lead <= math.max(1, worker.slots * MAX_LEAD)
    end
  end
  return cache[other]
end

-- The worker with the longest cached prefix among those that could start the job now; nil if there is none.
function affinity.preferred(prefixes, claimer, model, cache)
  for _, prefix in ipairs(prefixes) do
    local preferred
    for _, name in ipairs(prefix.workers) do
      if name == claimer then
        return claimer
      end
      preferred = preferred or has_room(name, claimer, model, cache) and name
    end
    if preferred then
      return preferred
    end
  end
end

function affinity.count(model, outcome)
  redis.call('HINCRBY', K.ROUTED, model .. ':' .. outcome, 1)
end

-- Seconds for which the job is still deferred to another worker; nil if any worker may claim it.
function affinity.defer(id, model, deferred_at)
  if not deferred_at then
    deferred_at = stamp(now())
    redis.call('HSET', K.JOB .. id, 'deferred_at', deferred_at)
    affinity.count(model, 'deferred')
  end
  local since = now() - tonumber(deferred_at)
  if since >= 0 and since < DEFER_S then -- negative if the clock was set back; the job is then not deferred
    return DEFER_S - since
  end
end

-- Records that the claiming worker will have these prefixes cached.
function affinity.remember(model, claimer, prefixes)
  local entries = {}
  for _, prefix in ipairs(prefixes) do
    local workers = {claimer}
    for _, name in ipairs(prefix.workers) do
      if name ~= claimer and #workers < MAX_WORKERS then
        workers[#workers + 1] = name
      end
    end
    entries[#entries + 1] = prefix.place
    entries[#entries + 1] = prefix.rest .. ' ' .. table.concat(workers, ' ')
  end
  redis.call('HSET', K.PREFIXES .. model, unpack(entries))
  redis.call('EXPIRE', K.PREFIXES .. model, REMEMBER_S)
end
