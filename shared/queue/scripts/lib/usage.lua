-- Tokens of API keys: what a key has used by day and model, and what its unfinished jobs may still use. Needs lib/clock.lua.
--
-- K.USAGE..owner..':'..day has a field per model with counters in this order, separated by spaces. `day` is the number of
-- days since the epoch, in UTC. A newer version may append counters; this one keeps them.
local COUNTERS = {'succeeded', 'failed', 'cancelled', 'expired', 'prompt', 'cached', 'completion', 'reasoning'}
local PROMPT, COMPLETION = 5, 7
local DAY_S = 86400
local USAGE_DAYS = 400

-- K.CHARGES..owner exists for keys with a token limit:
-- * `debt`: used tokens that the limit per minute has not refilled yet, as of `at`
-- * `reserved`: tokens that its unfinished jobs are expected to use
local TOKENS_TTL_S = 8 * DAY_S -- longer than a job can take

local function usage_key(owner, at)
  return K.USAGE .. owner .. ':' .. math.floor(at / DAY_S)
end

local function read_counters(text)
  local counters = {}
  for number in (text or ''):gmatch('%d+') do
    counters[#counters + 1] = tonumber(number)
  end
  return counters
end

-- Counts an ended job. `tokens` has its numbers of tokens, by name of the counter.
local function count_usage(owner, model, status, at, tokens)
  local key = usage_key(owner, at)
  local counters = read_counters(redis.call('HGET', key, model))
  for i, name in ipairs(COUNTERS) do
    counters[i] = (counters[i] or 0) + (tonumber(tokens[name]) or 0) + (name == status and 1 or 0)
  end
  if redis.call('HSET', key, model, table.concat(counters, ' ')) == 1 then
    redis.call('EXPIRE', key, USAGE_DAYS * DAY_S)
  end
end

-- The tokens that a key has used today, with all models.
local function tokens_today(owner, at)
  local total = 0
  for _, text in ipairs(redis.call('HVALS', usage_key(owner, at))) do
    local counters = read_counters(text)
    total = total + (counters[PROMPT] or 0) + (counters[COMPLETION] or 0)
  end
  return total
end

-- Stores the charges of an owner, including the tokens that new jobs are expected to use.
local function charge_tokens(owner, debt, reserved, at)
  redis.call('HSET', K.CHARGES .. owner, 'debt', stamp(debt), 'at', stamp(at), 'reserved',
    string.format('%.0f', reserved))
  redis.call('EXPIRE', K.CHARGES .. owner, TOKENS_TTL_S)
end

-- Corrects the charge of a job that has ended: `used` tokens instead of those expected.
local function settle_charge(owner, expected, used)
  local key = K.CHARGES .. owner
  if redis.call('EXISTS', key) == 1 then
    redis.call('HINCRBYFLOAT', key, 'debt', used - expected)
    redis.call('HINCRBY', key, 'reserved', -expected)
  end
end

