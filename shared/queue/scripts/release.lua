-- A worker hands running jobs back, to continue elsewhere.
-- ARGV: worker, losses a job may have when this counts as one or '', then id, attempt a job
-- Returns model, id for each job that waits again.
local worker, most_losses = ARGV[1], tonumber(ARGV[2])
local back = {}
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local status, attempt, holder = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'attempt', 'worker'))
  if status == 'running' and attempt == ARGV[i + 1] and holder == worker then
    if hand_back(id, worker, most_losses) then
      back[#back + 1] = redis.call('HGET', K.JOB .. id, 'model')
      back[#back + 1] = id
    end
  elseif holder ~= worker then -- or the worker has it again, as a later attempt
    redis.call('SREM', K.RUNNING .. worker, id)
  end
end
return back
