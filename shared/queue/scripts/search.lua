-- Examines jobs for a search. Clients parse one string for each job many times faster than its fields.
-- ARGV: status, model and class that a job must have ('' for any), then ids of jobs
-- Returns for each job '' if it does not exist, 'deleted', '-' and its time of creation if it does not match, or
-- '+' and its time of creation, a space, its owner, a space, and its metadata
local status, model, class = ARGV[1], ARGV[2], ARGV[3]

local function matches(value, wanted)
  return wanted == '' or value == wanted
end

local found = {}
for index = 4, #ARGV do
  local job = redis.call('HMGET', K.JOB .. ARGV[index], 'created_at', 'deleted', 'status', 'model', 'class', 'owner', 'metadata')
  local text = ''
  if job[1] and job[2] then
    text = 'deleted'
  elseif job[1] and matches(job[3], status) and matches(job[4], model) and matches(job[5], class) then
    text = '+' .. job[1] .. ' ' .. job[6] .. ' ' .. job[7]
  elseif job[1] then
    text = '-' .. job[1]
  end
  found[#found + 1] = text
end
return found
