-- Lets the background process erase deleted jobs of an API key from the archive, unless no process has ever opened it,
-- and workers the key's cached prefixes that were not used since a time.
local function erase(jobs, owner, unused_since)
  if redis.call('HEXISTS', K.BYTES, 'archive') == 1 then
    for _, job in ipairs(jobs) do
      redis.call('ZADD', K.ERASED, stamp(now()), job)
    end
  end
  redis.call('ZADD', K.PREFIX_CUTOFFS, 'GT', unused_since, owner)
end

