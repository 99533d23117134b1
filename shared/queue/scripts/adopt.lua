-- uses: layout
-- Moves jobs of the first layout to today's, where no old worker runs them.
-- ARGV: ids
-- Returns how many are left because an old worker runs them.
local left = 0
for i = 1, #ARGV do
  adopt(ARGV[i])
  left = left + redis.call('HEXISTS', K.JOB .. ARGV[i], 'generation')
end
return left
