-- A worker leaves: what it holds goes back to the queue, its lease and its card go.
-- ARGV: worker
-- Returns the models that have waiting jobs now.
local worker = ARGV[1]
local models = {}
for _, key in ipairs({K.RESERVED, K.RUNNING}) do
  for _, id in ipairs(redis.call('SMEMBERS', key .. worker)) do
    models[#models + 1] = give_back(id, worker, 'handed_back')
  end
end
forget_worker(worker)
return distinct(models)
