-- A worker leaves: what it holds goes back, its lease and its card go.
-- ARGV: worker, losses a job may have when this counts as one or ''
-- Returns model, id for each job that waits again.
local worker, most_losses = ARGV[1], tonumber(ARGV[2])
local back = {}
for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING .. worker)) do
  local status, holder, model = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'worker', 'model'))
  if status == 'running' and holder == worker and hand_back(id, worker, most_losses) then
    back[#back + 1] = model
    back[#back + 1] = id
  end
end
forget_worker(worker)
return back
