-- Returns jobs of a worker to the queue, running or reserved ones.
-- ARGV: worker, then job id, claimed_at of each job
-- Returns the models that have queued jobs because of this.
local worker = ARGV[1]
local models = {}
for i = 2, #ARGV, 2 do
  local id = ARGV[i]
  local claimed_at = redis.call('HGET', K.JOB .. id, 'claimed_at')
  if not holds(id, worker) then -- another worker holds the job, or an old process has ended it
    redis.call('SREM', K.RUNNING .. worker, id)
    redis.call('SREM', K.RESERVED .. worker, id)
  elseif claimed_at == ARGV[i + 1] then -- otherwise the worker has claimed the job again
    models[#models + 1] = give_back(id, worker, 'handed_back')
  end
end
return distinct(models)
