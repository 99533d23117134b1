-- Limits of an owner's tokens, and how long a rejected request should wait. Needs lib/job.lua.
--
-- The limit per minute is a bucket: a job takes the tokens that it is expected to use, its end corrects the number, and
-- time fills the bucket again. So a key uses its limit on average, and a minute's tokens at once at most. A job that needs
-- more than the whole bucket starts with a full one, and the next job waits longer.

local MINUTE_S = 60
local DEFAULT_WAIT_S = 10 -- while no rate has been measured
local MAX_WAIT_S = 600

-- Returns the token limits that a request names, and their state; nil if it names none.
local function read_limits(request, at)
  local per_minute, per_day = request.tokens_per_minute, request.tokens_per_day
  if per_minute == 0 and per_day == 0 then
    return nil
  end
  local key = K.CHARGES .. request.owner
  local debt, since, reserved = unpack(redis.call('HMGET', key, 'debt', 'at', 'reserved'))
  if redis.call('HEXISTS', K.BYTES, 'owner:' .. request.owner) == 0 then
    reserved = '0' -- no job is unfinished; a process of an earlier version may have ended one
  end
  local paid = per_minute / MINUTE_S * (at - tonumber(since or at))
  local owed = per_minute > 0 and math.max(0, tonumber(debt or '0') - paid) or 0
  return {per_minute = per_minute, per_day = per_day, debt = owed,
    reserved = math.max(0, tonumber(reserved or '0')), today = per_day > 0 and tokens_today(request.owner, at) or 0,
    day_left_s = DAY_S - at % DAY_S}
end

-- Returns which token limit further jobs would exceed, and the seconds until they would not; nil if none.
local function exceeded_tokens(limits, expected)
  if not limits then
    return nil
  end
  local above = limits.debt + expected - limits.per_minute
  if limits.per_minute > 0 and limits.debt > 0 and above > 0 then
    return 'tokens per minute', math.min(above, limits.debt) * MINUTE_S / limits.per_minute
  elseif limits.per_day > 0 and limits.today + expected > limits.per_day then
    return 'tokens per day', limits.day_left_s
  elseif limits.per_day > 0 and limits.today + limits.reserved + expected > limits.per_day then
    return 'tokens per day', math.min(DEFAULT_WAIT_S, limits.day_left_s) -- unfinished jobs may use less
  end
end

-- Returns {limit, rest, seconds until it is whole again} for the minute and then for the day, after `taken` more tokens.
local function tokens_left(limits, taken)
  local debt, per_minute = limits.debt + taken, limits.per_minute
  return {tostring(per_minute), stamp(per_minute - debt), stamp(per_minute > 0 and debt * MINUTE_S / per_minute or 0),
    tostring(limits.per_day), stamp(limits.per_day - limits.today - limits.reserved - taken), stamp(limits.day_left_s)}
end

-- The measured seconds between two starts of a class of a model's jobs, or of those of one of its owners.
local function seconds_per_start(model, class, owner)
  local starts, seconds = unpack(redis.call('HMGET', K.SPEED .. model, 'starts:' .. class, 'seconds:' .. class))
  if tonumber(starts or '0') == 0 then
    return DEFAULT_WAIT_S
  end
  local mean_s = tonumber(seconds) / tonumber(starts)
  local owners = owner and math.max(1, redis.call('HLEN', K.QUEUED .. model) - 1) or 1
  return math.max(1, math.min(MAX_WAIT_S, math.ceil(mean_s * owners)))
end

