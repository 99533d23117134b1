-- Accepts a batch (`web.batches.store`).
-- ARGV[1]: a JSON object with
--   id, owner, max_unfinished    maximum unfinished batches of the owner
--   max_kept                     maximum batches of the owner; the oldest that have ended are deleted first
-- ARGV[2..]: record fields as name, value, …
-- Returns 'created', or 'full' if the owner has too many unfinished batches. Repeated calls create nothing.
local request = cjson.decode(ARGV[1])
local id, owner = request.id, request.owner
local batch, mine, unfinished = K.BATCH .. id, K.BATCHES .. owner, K.UNFINISHED_BATCHES .. ':' .. owner
if redis.call('EXISTS', batch) == 1 then
  redis.call('HSET', batch, 'id', id) -- the durability check covers only writes of the same connection
  return 'created'
end
if redis.call('ZCARD', unfinished) >= request.max_unfinished then
  return 'full'
end
local at = stamp(now())
redis.call('HSET', batch, unpack(ARGV, 2))
redis.call('ZADD', mine, at, id)
redis.call('ZADD', unfinished, at, id)
redis.call('ZADD', K.UNFINISHED_BATCHES, at, id)
for _, oldest in ipairs(redis.call('ZRANGE', mine, 0, -request.max_kept - 1)) do
  if not redis.call('ZSCORE', unfinished, oldest) then
    redis.call('DEL', K.BATCH .. oldest)
    redis.call('ZREM', mine, oldest)
  end
end
for _, oldest in ipairs(redis.call('ZRANGE', mine, 0, 1)) do
  if redis.call('EXISTS', K.BATCH .. oldest) == 0 then -- checking two per new batch bounds the list
    redis.call('ZREM', mine, oldest)
  end
end
return 'created'
