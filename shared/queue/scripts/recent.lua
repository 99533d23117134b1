-- Reads an owner's newest jobs, and removes deleted or expired jobs from the owner's list.
-- ARGV: owner, maximum creation time as an argument of ZRANGE ('+inf', or '(' and an excluded time), maximum count
-- Returns the records, newest first, each as a JSON array of name, value, … Clients parse one string many times faster
-- than a reply with forty elements.
local list, max_time, limit = K.OWNER .. ARGV[1], ARGV[2], ARGV[3]
local records, missing
repeat -- until a page has no missing jobs: a short page would look like the last one
  records, missing = {}, {}
  for _, id in ipairs(redis.call('ZRANGE', list, max_time, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, limit)) do
    local record = redis.call('HGETALL', K.JOB .. id)
    if #record == 0 then
      missing[#missing + 1] = id
    else
      records[#records + 1] = cjson.encode(record)
    end
  end
  if #missing > 0 then
    redis.call('ZREM', list, unpack(missing))
  end
until #missing == 0
return records
