-- Limits on running jobs per owner. The jobs are counted when a limit must be checked, which takes about 1 µs per running
-- job, so no counter can drift. Needs lib/job.lua.

local running = {}
local counts -- of this call of the script

local function add_owners(counted, key)
  for _, id in ipairs(redis.call('SMEMBERS', key)) do
    local owner = redis.call('HGET', K.JOB .. id, 'owner')
    if owner then
      counted[owner] = (counted[owner] or 0) + 1
    end
  end
end

local function count_all()
  if not counts then
    counts = {running = {}, reserved = {}}
    for _, worker in ipairs(redis.call('ZRANGE', K.LEASES, 0, -1)) do
      add_owners(counts.running, K.RUNNING .. worker)
      add_owners(counts.reserved, K.RESERVED .. worker)
    end
  end
  return counts
end

-- Whether any owner has a limit.
function running.limited()
  return redis.call('EXISTS', K.MAX_RUNNING) == 1
end

-- Whether an owner runs as many jobs as it may, including those that workers have reserved.
function running.at_limit(owner)
  local max = tonumber(redis.call('HGET', K.MAX_RUNNING, owner) or '0')
  if max == 0 then
    return false
  end
  local counted = count_all()
  return (counted.running[owner] or 0) + (counted.reserved[owner] or 0) >= max
end

-- Counts a job that the script has just reserved.
function running.add(owner)
  if counts then
    counts.reserved[owner] = (counts.reserved[owner] or 0) + 1
  end
end

local MAX_UNPARKED = 200

-- Returns parked jobs to the queue, for each owner as many as may run. Returns the models of these jobs. `model`: only
-- those of this model; nil for all.
function running.unpark(model)
  local models = {}
  for _, field in ipairs(redis.call('HKEYS', K.PARKED_COUNTS)) do
    local name, owner = field:match('^(.*) (%S+)$')
    if model == nil or name == model then
      local max = tonumber(redis.call('HGET', K.MAX_RUNNING, owner) or '0')
      local queued = tonumber(redis.call('HGET', K.QUEUED .. name, owner) or '0')
      local parked = tonumber(redis.call('HGET', K.PARKED_COUNTS, field))
      local present = math.max(0, queued - parked) + (count_all().running[owner] or 0)
      local room = max == 0 and MAX_UNPARKED or math.min(MAX_UNPARKED, max - present)
      if room > 0 and unpark(name, owner, room) > 0 then
        models[#models + 1] = name
      end
    end
  end
  return models
end

