-- Converts jobs from the first layout (one hash per job, a separate queue) to the current one. Old processes may still be
-- running: they see neither converted nor new jobs. Needs lib/job.lua.

-- Returns the JSON of `shared.jobs.record.Parsing` for a request; nil if its answer is not parsed.
local function parsing_of(request)
  if not request.parse or request.parse == cjson.null then
    return nil
  end
  local image_size
  for _, message in ipairs(type(request.messages) == 'table' and request.messages or {}) do
    for _, part in ipairs(type(message.content) == 'table' and message.content or {}) do
      image_size = part.type == 'image' and {part.width, part.height} or image_size
    end
  end
  return cjson.encode({format = request.parse, image_size = image_size})
end

local function text_in_log(id)
  local text = {}
  for _, entry in ipairs(redis.call('XRANGE', K.LOG .. id, '-', '+')) do
    if entry[2][2] == 'chunk' then
      text[#text + 1] = cjson.decode(entry[2][4]).text
    end
  end
  return table.concat(text)
end

local function move_queued(id, model, class, owner)
  local score = redis.call('ZSCORE', K.OLD_QUEUE .. model, id)
  redis.call('ZREM', K.OLD_QUEUE .. model, id)
  local turn = score and tonumber(score) - tonumber(class) * CLASS_WIDTH or 0
  join_queue(id, model, class, turn)
  local last = tonumber(redis.call('HGET', K.TURNS .. model, class .. ':' .. owner) or '0')
  redis.call('HSET', K.TURNS .. model, class .. ':' .. owner, math.max(last, turn))
end

-- Converts a job unless an old worker is running it; `lost` says that this worker is dead. Returns the job's model if it
-- was converted and is queued, else nil.
local function adopt(id, lost)
  local job = K.JOB .. id
  local request, status, model, class, owner, retention, text, attempt = unpack(redis.call('HMGET', job,
    'generation', 'status', 'model', 'class', 'owner', 'retention_s', 'text', 'attempt'))
  if not request or status == 'running' and not lost then
    return nil
  end
  local parsing = parsing_of(cjson.decode(request))
  if parsing then
    redis.call('HSET', job, 'parsing', parsing)
  end
  text = text or tonumber(attempt) > 0 and text_in_log(id) or ''
  if text ~= '' then
    redis.call('SET', K.OUTPUT .. id, text)
  end
  redis.call('HDEL', job, 'generation', 'text', 'alone', 'losses', 'left_at', 'seen_to')
  redis.call('HSET', job, 'request_bytes', #request)
  redis.call('HSET', K.REQUEST .. id, 'request', request)
  if status == 'queued' or status == 'running' then
    redis.call('HSET', job, 'bytes', #request)
    count_bytes('total', #request)
    count_bytes('owner:' .. owner, #request)
  end
  if status == 'queued' then
    redis.call('HSET', job, 'worker', '')
    move_queued(id, model, class, owner)
    return model
  elseif status == 'running' then
    return nil
  end
  local ttl_s = redis.call('TTL', job)
  settle_request(id, status, ttl_s > 0 and ttl_s or retention)
  if ttl_s > 0 and text ~= '' then
    redis.call('EXPIRE', K.OUTPUT .. id, ttl_s)
  end
end

-- Converts the first `limit` jobs that old processes have queued for a model. Some may have the current layout already: an
-- old reaper puts jobs into the old queue when the lease of a new worker expires.
local function adopt_queue(model, limit)
  for _, id in ipairs(redis.call('ZRANGE', K.OLD_QUEUE .. model, 0, limit - 1)) do
    if not adopt(id) then
      local status, class, owner = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'class', 'owner'))
      if status == 'queued' and not redis.call('ZSCORE', K.QUEUE .. model, id) then
        move_queued(id, model, class, owner)
      end
      redis.call('ZREM', K.OLD_QUEUE .. model, id)
    end
  end
end

-- Completes the end of a job of the current layout that an old process ended: it does not know the newer keys.
local function settle_foreign_end(id)
  local owner, status, retention, bytes = unpack(redis.call('HMGET', K.JOB .. id,
    'owner', 'status', 'retention_s', 'bytes'))
  if bytes and status ~= 'running' then
    release_bytes(id, owner)
    settle_request(id, status, retention)
    redis.call('EXPIRE', K.OUTPUT .. id, retention)
  end
end
