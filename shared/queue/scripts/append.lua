-- Writes the output of engine steps for all rows of a batch: admissions, text with its tokens, and endings.
-- ARGV: one JSON object per row, with
--   id, attempt, claimed_at
--   start    true if the row was admitted to the batch: its attempt starts
--   prompt   packed token ids of the prompt, if this worker tokenised it
--   n        number of the next event: the chunk event with `text`, or the terminal event if there is no text
--   text (may be empty), tokens ('a,b,c'), extra (further members of the event's JSON object, without braces)
--   ending   record fields of a job that ends, with `status`
-- Returns one result per row: 'ok'; 'cancelled' or 'expired' if the job must stop; 'fenced' if nothing was written.
--
-- Invariants: a row of another attempt or another claim is fenced. An event that the log already has is skipped, so
-- the call may be repeated. An event that would leave a gap is fenced. `claimed_at` is compared in addition to the
-- attempt: after a Redis failover that lost the last writes, two attempts may have the same number.

-- Starts the attempt that a claim reserved. Returns whether the row's attempt is the current one.
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

-- The result for a job that is not running. It is 'ok' if this is a repeated call whose first try ended the job.
local function result_when_ended(row, job)
  local same = tonumber(job.attempt or '-1') == row.attempt and job.claimed_at == row.claimed_at
  return same and row.ending and row.ending.status == job.status and 'ok' or 'fenced'
end

local function append(row)
  local job = read_job(row.id)
  if row.start and begin(row, job) then
    job = read_job(row.id)
  end
  if job.status ~= 'running' or tonumber(job.attempt) ~= row.attempt or job.claimed_at ~= row.claimed_at then
    return result_when_ended(row, job)
  end
  local result = job.stop_as or 'ok'
  if (row.n or 0) > job.seq + 1 then
    return 'fenced' -- Redis has lost earlier events: another attempt must generate them again
  elseif row.text and row.n > job.seq then
    write_chunk(row)
  end
  if row.ending then
    local fields = row.ending
    local status = fields.status
    fields.status = nil
    finish(row.id, status, fields, true)
  end
  return result
end

local results = {}
for i = 1, #ARGV do
  results[i] = append(cjson.decode(ARGV[i]))
end
return results
