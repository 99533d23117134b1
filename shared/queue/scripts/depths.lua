-- Counts the queued jobs of models by class, and finds the oldest ones.
-- ARGV: models
-- Returns for each model and class with queued jobs: model, class, number of jobs, age of the oldest in seconds
local CLASSES = 3
local EXAMINED = 100 -- an owner's own jobs are in order of age, so this finds the oldest job of 100 owners and more
local at = now()

local function oldest_s(model, low, high)
  local oldest = at
  for _, id in ipairs(redis.call('ZRANGE', K.QUEUE .. model, low, high, 'BYSCORE', 'LIMIT', 0, EXAMINED)) do
    local created = redis.call('HGET', K.JOB .. id, 'created_at')
    oldest = math.min(oldest, tonumber(created or at))
  end
  return at - oldest
end

local depths = {}
for _, model in ipairs(ARGV) do
  for class = 0, CLASSES - 1 do
    local low = string.format('%.0f', class * CLASS_WIDTH)
    local high = string.format('(%.0f', (class + 1) * CLASS_WIDTH)
    local count = redis.call('ZCOUNT', K.QUEUE .. model, low, high)
    if count > 0 then
      for _, value in ipairs({model, class, count, stamp(oldest_s(model, low, high))}) do
        depths[#depths + 1] = value
      end
    end
  end
end
return depths
