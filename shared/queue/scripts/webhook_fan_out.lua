-- Turns events of the outbox into deliveries (`web.webhooks.deliveries`).
-- ARGV: the leader's token, maximum events, maximum deliveries that wait
-- Returns the number of events taken; 0 if the caller does not lead.
--
-- Invariant: an event leaves the outbox in the same call in which its deliveries are written.
local leader, limit, max_pending = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if redis.call('GET', K.LEADER) ~= leader then
  return 0
end
local endpoints = {}
for _, text in ipairs(redis.call('HVALS', K.WEBHOOK_ENDPOINTS)) do
  endpoints[#endpoints + 1] = cjson.decode(text)
end

local function wants(receiver, kind)
  for _, each in ipairs(receiver.events) do
    if each == kind then
      return true
    end
  end
  return false
end

-- `number` is unique among all events; `n` is the number of the receiver.
local function deliver(event, number, n, endpoint, url)
  local id = 'wh_' .. number .. '_' .. n
  redis.call('HSET', K.WEBHOOK .. id, 'id', id, 'event_id', 'evt_' .. number, 'kind', event.kind, 'object_id', event.id,
    'owner', event.owner, 'endpoint', endpoint, 'url', url, 'created_at', event.at, 'status', 'pending',
    'attempts', 0, 'next_at', stamp(now()))
  redis.call('ZADD', K.WEBHOOKS_DUE, stamp(now()), id)
end

local taken = 0
while taken < limit and redis.call('ZCARD', K.WEBHOOKS_DUE) < max_pending do
  local text = redis.call('LPOP', K.WEBHOOK_OUTBOX)
  if not text then
    break
  end
  taken = taken + 1
  local event = cjson.decode(text)
  -- The time keeps numbers unique if Redis loses its data and the counter begins anew.
  local number = event.at:gsub('%.', '') .. redis.call('HINCRBY', K.WEBHOOK_COUNTS, 'events', 1)
  for n, endpoint in ipairs(endpoints) do
    if wants(endpoint, event.kind) then
      deliver(event, number, n, endpoint.id, endpoint.url)
    end
  end
  if event.hook then
    local hook = cjson.decode(event.hook)
    if wants(hook, event.kind) then
      deliver(event, number, 0, '', hook.url)
    end
  end
end
return taken
