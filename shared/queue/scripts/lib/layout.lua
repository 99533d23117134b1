-- Converts a job from the first layout (one hash per job, a separate queue) to the present one. Old processes may still
-- run: they see neither converted nor new jobs. Needs lib/job.lua.

-- Reads what views need of a request: how its answer is parsed, and the size of its last image.
local function parsing_of(request)
  if not request.parse or request.parse == cjson.null then
    return nil
  end
  local image
  for _, message in ipairs(type(request.messages) == 'table' and request.messages or {}) do
    for _, part in ipairs(type(message.content) == 'table' and message.content or {}) do
      image = part.type == 'image' and {part.width, part.height} or image
    end
  end
  return cjson.encode({format = request.parse, image_size = image})
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

-- Moves a job that no old worker runs, or whose old worker is gone (`lost`). Returns its model when it waits, else
-- nothing.
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
  local left = redis.call('TTL', job)
  settle_request(id, status, left > 0 and left or retention)
  if left > 0 and text ~= '' then
    redis.call('EXPIRE', K.OUTPUT .. id, left)
  end
end

-- Moves what old processes have queued for a model meanwhile, the first `most` jobs. That may be a job of today's
-- layout which an old reaper took from a worker whose lease had lapsed.
local function adopt_queue(model, most)
  for _, id in ipairs(redis.call('ZRANGE', K.OLD_QUEUE .. model, 0, most - 1)) do
    if not adopt(id) then
      local status, class, owner = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'class', 'owner'))
      if status == 'queued' and not redis.call('ZSCORE', K.QUEUE .. model, id) then
        move_queued(id, model, class, owner)
      end
      redis.call('ZREM', K.OLD_QUEUE .. model, id)
    end
  end
end

-- A job of today's layout that an old process ended: what that knew nothing of goes as with every end.
local function settle_foreign_end(id)
  local owner, status, retention, bytes = unpack(redis.call('HMGET', K.JOB .. id,
    'owner', 'status', 'retention_s', 'bytes'))
  if bytes and status ~= 'running' then
    release_bytes(id, owner)
    settle_request(id, status, retention)
    redis.call('EXPIRE', K.OUTPUT .. id, retention)
  end
end
