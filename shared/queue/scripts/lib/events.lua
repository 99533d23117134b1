-- Records ends for other processes: Celery's task events, and webhooks. Needs lib/clock.lua.

local MAX_ENDS_KEPT = 10000

-- Records a job that ended without a worker, for Celery's task events. They only inform operators, so only the newest are
-- kept.
local function report_end(id, model, status, fields)
  redis.call('RPUSH', K.ENDS, cjson.encode({id = id, model = model, status = status, error_code = fields.error_code,
    error_message = fields.error_message}))
  redis.call('LTRIM', K.ENDS, -MAX_ENDS_KEPT, -1)
end

local MAX_OUTBOX = 100000

-- Records an event for webhooks if there may be a receiver: a registered endpoint, or `hook`, the JSON of the URL and the
-- events that a job names. If the background process has not taken events for long, the oldest are dropped and counted.
local function publish_event(kind, id, owner, hook)
  hook = hook and hook ~= '' and hook or nil
  if hook == '-' then -- a line of a batch: its owner waits for the batch
    return
  elseif not hook and redis.call('EXISTS', K.WEBHOOK_ENDPOINTS) == 0 then
    return
  end
  local event = cjson.encode({kind = kind, id = id, owner = owner, at = stamp(now()), hook = hook})
  if redis.call('RPUSH', K.WEBHOOK_OUTBOX, event) > MAX_OUTBOX then
    redis.call('LPOP', K.WEBHOOK_OUTBOX)
    redis.call('HINCRBY', K.WEBHOOK_COUNTS, 'dropped', 1)
  end
end

-- Records the event that a background response has ended.
local function publish_response(id, status, finish_reason, owner, hook)
  local kind = status
  if status == 'succeeded' then
    kind = finish_reason == 'length' and 'incomplete' or 'completed'
  elseif status == 'expired' then
    kind = 'failed'
  end
  publish_event('response.' .. kind, (id:gsub('^job_', 'resp_')), owner, hook)
end

