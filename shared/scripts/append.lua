-- What one engine step gave, for all its rows: text with its tokens, and ends.
-- ARGV, six a row: id, attempt, number of the event, event data as JSON or '', tokens as 'a,b,c',
--                  terminal fields as a JSON object with `status`, or ''
-- An event whose number the log has already is passed over, so the call may be sent again.
-- Returns a word a row: 'ok'; 'cancelled' or 'expired' when that is asked of the job; 'fenced' when the attempt is
-- not the record's any more (or the job is not running): then nothing was written. So too when events before this one
-- are missing, because Redis came back without its last second: another attempt says them again.
local replies = {}
for i = 1, #ARGV, 6 do
  local id, attempt, n = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local status, current, seq, stop = unpack(redis.call('HMGET', K.JOB .. id, 'status', 'attempt', 'seq', 'stop_as'))
  local reply = 'fenced'
  if status == 'running' and current == attempt and n <= tonumber(seq) + 1 then
    reply = stop or 'ok'
    if ARGV[i + 3] ~= '' and n > tonumber(seq) then
      write_event(id, n, 'chunk', ARGV[i + 3], ARGV[i + 4])
    end
    if ARGV[i + 5] ~= '' then
      local fields = cjson.decode(ARGV[i + 5])
      local ending = fields.status
      fields.status = nil
      finish(id, ending, fields)
    end
  elseif current == attempt and status ~= 'queued' then
    -- The job has ended: either by what is sent here, again because the answer was lost, or without us.
    local again = ARGV[i + 5] == '' and n < tonumber(seq)
      or ARGV[i + 5] ~= '' and cjson.decode(ARGV[i + 5]).status == status
    reply = again and 'ok' or 'fenced'
  end
  replies[#replies + 1] = reply
end
return replies
