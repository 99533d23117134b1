-- uses: layout
-- Converts jobs from the first layout to the current one, except jobs that an old worker is running.
-- ARGV: job ids
-- Returns the number of jobs that were not converted.
local remaining = 0
for i = 1, #ARGV do
  adopt(ARGV[i])
  remaining = remaining + redis.call('HEXISTS', K.JOB .. ARGV[i], 'generation')
end
return remaining
