-- What one engine step gave, for all its rows: text with its tokens, and ends.
-- ARGV, one a row, with seven lines: id, attempt, when it was claimed, number of the event, event data as JSON or '',
--                  tokens as 'a,b,c', terminal fields as a JSON object with `status`, or ''
-- An event whose number the log has already is passed over, so the call may be sent again.
-- Returns a word a row: 'ok'; 'cancelled' or 'expired' when that is asked of the job; 'fenced' when the attempt is
-- not the record's any more (or the job is not running): then nothing was written. The moment of the claim is compared
-- as well: a Redis that came back without its last writes may give the same number to two. If it lost events before
-- this one, another attempt says them again.
local SEVEN_LINES = '^' .. string.rep('([^\n]*)\n', 6) .. '([^\n]*)$'
local replies = {}
for i = 1, #ARGV do
  local id, attempt, moment, number, data, tokens, ending = string.match(ARGV[i], SEVEN_LINES)
  local n = tonumber(number)
  local status, newest, claimed, seq, stop =
    unpack(redis.call('HMGET', K.JOB .. id, 'status', 'attempt', 'claimed_at', 'seq', 'stop_as'))
  local ours = newest == attempt and (claimed or '') == moment
  local reply = 'fenced'
  if status == 'running' and ours and n <= tonumber(seq) + 1 then
    reply = stop or 'ok'
    if data ~= '' and n > tonumber(seq) then
      write_event(id, n, 'chunk', data, tokens)
    end
    if ending ~= '' then
      local fields = cjson.decode(ending)
      local status_then = fields.status
      fields.status = nil
      finish(id, status_then, fields)
    end
  elseif ours and status ~= 'queued' then
    -- The job has ended: either by what is sent here, again because the answer was lost, or without us.
    local again = ending == '' and n < tonumber(seq) or ending ~= '' and cjson.decode(ending).status == status
    reply = again and 'ok' or 'fenced'
  end
  replies[#replies + 1] = reply
end
return replies
