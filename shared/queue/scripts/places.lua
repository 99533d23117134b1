-- Returns the place of each job in its queue; see `queue_place`.
-- ARGV: job ids
local places = {}
for i, id in ipairs(ARGV) do
  local model, owner, class = unpack(redis.call('HMGET', K.JOB .. id, 'model', 'owner', 'class'))
  places[i] = model and queue_place(id, model, owner, class) or {}
end
return places
