-- Finds the job of an earlier try of a request, whose connection was lost, and lets the caller read it.
-- ARGV: owner, fingerprint, seconds for which a job can be joined after the loss, id of the reader that joins, ids of readers
--   that have died
-- Returns {id} of the job; otherwise {'', ids of the readers of the owner's unfinished jobs with this fingerprint}.
local owner, fingerprint, within_s, reader = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local NEWEST = 200 -- jobs of the owner that are searched
local dead = {}
for i = 5, #ARGV do
  dead[ARGV[i]] = true
end
local readers = {''}
for _, id in ipairs(redis.call('ZRANGE', K.OWNER .. owner, '+inf', '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, NEWEST)) do
  local job = K.JOB .. id
  local other, detached_at, read_by, status, deleted = unpack(redis.call('HMGET', job,
    'fingerprint', 'detached_at', 'reader', 'status', 'deleted'))
  if other == fingerprint and read_by and not deleted then
    local lost = detached_at and now() - tonumber(detached_at) <= within_s
    if lost or dead[read_by] then
      redis.call('HDEL', job, 'detached_at')
      redis.call('HSET', job, 'reader', reader)
      return {id}
    elseif status == 'queued' or status == 'running' then
      readers[#readers + 1] = read_by
    end
  end
end
return readers
