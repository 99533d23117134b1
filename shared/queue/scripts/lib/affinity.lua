-- Prefix affinity: a job is deferred for at most DEFER_S to the worker that has its prefix cached, if that worker has
-- room. So a frozen or busy worker delays a job by no more than that, and jobs with a common prefix do not all go to one
-- worker. Needs lib/job.lua.

local DEFER_S = 0.2
local MOST_WORKERS = 3 -- remembered per prefix
local REMEMBER_S = 3600
local LEAD = 1 / 4 -- jobs that a preferred worker may hold more than the claiming worker, as a share of its slots

local affinity = {}

local function held_by(worker)
  return redis.call('SCARD', K.RUNNING .. worker) + redis.call('SCARD', K.RESERVED .. worker)
end

-- The prefixes of a job, longest first, each with the workers that claimed a job with this prefix, newest first.
-- K.PREFIXES is a hash table with 65,536 places: the first 4 digits of a prefix hash are the place, the rest is compared.
function affinity.prefixes(model, hashes)
  local places, found = {}, {}
  for place, rest in hashes:gmatch('(%x%x%x%x)(%x+)') do
    places[#places + 1] = place
    found[#found + 1] = {place = place, rest = rest, workers = {}}
  end
  if #places == 0 then -- a newer process names prefixes otherwise
    return found
  end
  for i, entry in ipairs(redis.call('HMGET', K.PREFIXES .. model, unpack(places))) do
    local rest, workers = (entry or ''):match('^(%x+)(.+)$')
    for name in (rest == found[i].rest and workers or ''):gmatch('%S+') do
      table.insert(found[i].workers, name)
    end
  end
  return found
end

-- Whether another worker could start a job now. `cards` caches answers within one call of the script.
local function has_room(other, claimer, model, cards)
  if cards[other] == nil then
    cards[other] = false
    local card = has_lease(other, now()) and redis.call('GET', K.WORKER .. other)
    if card then
      local worker, busy = cjson.decode(card), held_by(other)
      local ahead = busy - held_by(claimer)
      cards[other] = worker.model == model and worker.state == 'ready' and busy < worker.slots
        and ahead <= math.max(1, worker.slots * LEAD)
    end
  end
  return cards[other]
end

-- The worker with the longest cached prefix among those that could start the job now; nil when there is none.
function affinity.preferred(prefixes, claimer, model, cards)
  for _, prefix in ipairs(prefixes) do
    local preferred
    for _, name in ipairs(prefix.workers) do
      if name == claimer then
        return claimer
      end
      preferred = preferred or has_room(name, claimer, model, cards) and name
    end
    if preferred then
      return preferred
    end
  end
end

function affinity.count(model, outcome)
  redis.call('HINCRBY', K.ROUTED, model .. ':' .. outcome, 1)
end

-- Seconds for which the job is still deferred to another worker; nil when any worker may take it.
function affinity.defer(id, model, deferred_at)
  if not deferred_at then
    deferred_at = stamp(now())
    redis.call('HSET', K.JOB .. id, 'deferred_at', deferred_at)
    affinity.count(model, 'deferred')
  end
  local since = now() - tonumber(deferred_at)
  if since >= 0 and since < DEFER_S then -- a clock that was set back makes no job wait
    return DEFER_S - since
  end
end

-- Remembers that a worker will hold these prefixes.
function affinity.remember(model, claimer, prefixes)
  local entries = {}
  for _, prefix in ipairs(prefixes) do
    local workers = {claimer}
    for _, name in ipairs(prefix.workers) do
      if name ~= claimer and #workers < MOST_WORKERS then
        workers[#workers + 1] = name
      end
    end
    entries[#entries + 1] = prefix.place
    entries[#entries + 1] = prefix.rest .. ' ' .. table.concat(workers, ' ')
  end
  redis.call('HSET', K.PREFIXES .. model, unpack(entries))
  redis.call('EXPIRE', K.PREFIXES .. model, REMEMBER_S)
end
