-- Returns the place of each job in its queue; see `queue_place`.
-- ARGV: job ids
local places = {}
for i, id in ipairs(ARGV) do
  places[i] = redis.call('EXISTS', K.JOB .. id) == 1 and queue_place(id) or {}
end
return places
