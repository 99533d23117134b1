-- Fails the queued jobs of a model that nothing can run. Jobs that a worker has reserved are left to it.
-- ARGV: model, error code, error message, maximum jobs to fail in this call
-- Returns the number of failed jobs
local model, code, message, limit = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local failed = 0
for _, id in ipairs(redis.call('ZRANGE', K.QUEUE .. model, 0, limit - 1)) do
  local status, worker = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'worker'))
  if status == 'queued' and (worker or '') == '' then
    finish(id, 'failed', {error_code = code, error_message = message})
    failed = failed + 1
  end
end
return failed
