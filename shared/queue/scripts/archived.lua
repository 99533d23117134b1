-- Removes jobs that have been archived from the list of those that wait, with the requests that were kept for it. Their
-- records now live for the retention of the jobs only.
-- ARGV: entries of K.UNARCHIVED
for _, member in ipairs(ARGV) do
  drop_unarchived(member)
  local id = member:match('^(.+) %d+$')
  local finished, retention = unpack(redis.call('HMGET', K.JOB .. id, 'finished_at', 'retention_s'))
  if finished and retention then
    local rest_s = math.max(1, math.ceil(finished + retention - now()))
    for _, key in ipairs({K.JOB, K.OUTPUT}) do
      if redis.call('TTL', key .. id) > rest_s then
        redis.call('EXPIRE', key .. id, rest_s)
      end
    end
  end
end
