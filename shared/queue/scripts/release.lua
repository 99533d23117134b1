-- A worker gives jobs up, to continue elsewhere: running ones, or reserved ones that it did not admit.
-- ARGV: worker, then id, claimed_at a job
-- Returns the models that have waiting jobs now.
local worker = ARGV[1]
local models = {}
for i = 2, #ARGV, 2 do
  local id = ARGV[i]
  local claimed_at = redis.call('HGET', K.JOB .. id, 'claimed_at')
  if not holds(id, worker) then -- it is another's, or an old process has ended it
    redis.call('SREM', K.RUNNING .. worker, id)
    redis.call('SREM', K.RESERVED .. worker, id)
  elseif claimed_at == ARGV[i + 1] then -- or the worker holds the job again, by a later claim
    models[#models + 1] = give_back(id, worker, 'handed_back')
  end
end
return distinct(models)
