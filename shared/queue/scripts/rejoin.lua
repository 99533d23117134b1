-- Finds the job of an earlier try of a request, whose connection was lost, and lets the caller read it.
-- ARGV: owner, fingerprint, id of the reader that joins, ids of readers that have died
-- Returns {id} of the job; otherwise {'', ids of the readers of the owner's unfinished jobs with this fingerprint}.
local owner, fingerprint, reader = ARGV[1], ARGV[2], ARGV[3]
local NEWEST = 200 -- jobs of the owner that are searched
local dead = {}
for i = 4, #ARGV do
  dead[ARGV[i]] = true
end
local readers = {''}
for _, id in ipairs(redis.call('ZRANGE', K.OWNER .. owner, '+inf', '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, NEWEST)) do
  local job = K.JOB .. id
  local other, kept_until, read_by, status, deleted = unpack(redis.call('HMGET', job,
    'fingerprint', 'kept_until', 'reader', 'status', 'deleted'))
  if other == fingerprint and read_by and not deleted then
    local unfinished = status == 'queued' or status == 'running'
    local lost = kept_until and now() <= tonumber(kept_until)
    if lost or (unfinished and dead[read_by]) then
      redis.call('HDEL', job, 'kept_until')
      redis.call('HSET', job, 'reader', reader)
      return {id}
    elseif unfinished then
      readers[#readers + 1] = read_by
    end
  end
end
return readers
