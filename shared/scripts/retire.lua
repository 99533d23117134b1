-- A worker leaves: what it holds goes back, its lease and its card go.
-- ARGV: worker
-- Returns model, id for each job that waits again.
local worker = ARGV[1]
local back = {}
for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING .. worker)) do
  local status, holder, model = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'worker', 'model'))
  if status == 'running' and holder == worker and requeue(id, worker) then
    back[#back + 1] = model
    back[#back + 1] = id
  end
end
redis.call('DEL', K.RUNNING .. worker, K.WORKER .. worker)
redis.call('ZREM', K.LEASES, worker)
return back
