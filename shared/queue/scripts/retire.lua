-- Removes a worker that shuts down: returns its jobs to the queue and deletes its lease and its state.
-- ARGV: worker
-- Returns the models that have queued jobs because of this.
local worker = ARGV[1]
local models = {}
for _, key in ipairs({K.RESERVED, K.RUNNING}) do
  for _, id in ipairs(redis.call('SMEMBERS', key .. worker)) do
    models[#models + 1] = give_back(id, worker, 'handed_back')
  end
end
forget_worker(worker)
return distinct(models)
