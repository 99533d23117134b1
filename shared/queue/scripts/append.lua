-- Writes the output of engine steps for all their rows: admissions, text with its tokens, and ends.
-- ARGV: a JSON object a row, with
--   id, attempt, claimed_at
--   start    whether the row was admitted to the batch: its attempt begins
--   prompt   token ids of the prompt (packed), when this worker made them
--   n        number of the next event: the chunk event that carries `text`, or the end where there is no text
--   text, tokens ('a,b,c'), extra (further members of the event's JSON object, or nothing)
--   ending   terminal record fields, with `status`
-- An event whose number the log has already is skipped, so the call may be sent again.
-- Returns a result per row: 'ok'; 'cancelled' or 'expired' when the job must stop; 'fenced' when the job belongs to
-- another attempt: then nothing was written. The time of the claim is compared as well, because a Redis that came back
-- without its last writes may give the same number to two attempts.

-- Begins the attempt that a claim reserved. Returns whether the row's attempt is the job's now.
local function begin(row, job)
  if job.status == 'queued' and job.claimed_at == row.claimed_at and job.worker ~= ''
    and tonumber(job.attempt) + 1 == row.attempt then
    if row.prompt then
      redis.call('HSET', K.REQUEST .. row.id, 'tokens', row.prompt)
    end
    admit(row.id)
    return true
  end
  return job.status == 'running' and tonumber(job.attempt) == row.attempt
end

local function read_job(id)
  local status, attempt, claimed_at, worker, seq, stop_as = unpack(redis.call('HMGET', K.JOB .. id,
    'status', 'attempt', 'claimed_at', 'worker', 'seq', 'stop_as'))
  return {status = status, attempt = attempt, claimed_at = claimed_at or '', worker = worker or '',
    seq = tonumber(seq or '0'), stop_as = stop_as}
end

local function write_chunk(row)
  local data = '{"text":' .. cjson.encode(row.text) .. (row.extra and ',' .. row.extra or '') .. '}'
  write_event(row.id, row.n, 'chunk', data, row.tokens or '')
  redis.call('APPEND', K.OUTPUT .. row.id, row.text)
end

-- The job is not running. It may have ended by what is sent here again because the answer was lost.
local function repeated(row, job)
  local same = tonumber(job.attempt or '-1') == row.attempt and job.claimed_at == row.claimed_at
  return same and row.ending and row.ending.status == job.status and 'ok' or 'fenced'
end

local function append(row)
  local job = read_job(row.id)
  if row.start and begin(row, job) then
    job = read_job(row.id)
  end
  if job.status ~= 'running' or tonumber(job.attempt) ~= row.attempt or job.claimed_at ~= row.claimed_at then
    return repeated(row, job)
  end
  local reply = job.stop_as or 'ok'
  if (row.n or 0) > job.seq + 1 then
    return 'fenced' -- Redis lost events before this one: another attempt writes them again
  elseif row.text and row.n > job.seq then
    write_chunk(row)
  end
  if row.ending then
    local fields = row.ending
    local status = fields.status
    fields.status = nil
    finish(row.id, status, fields, true)
  end
  return reply
end

local replies = {}
for i = 1, #ARGV do
  replies[i] = append(cjson.decode(ARGV[i]))
end
return replies
