-- Stores the state of a worker or of a worker process. It expires unless it is announced again in time.
-- ARGV: 'WORKER' or 'HOST', id, state as a non-empty JSON object, lifetime in ms, seconds since the start of the worker
-- Adds `heartbeat_at` and `started_at` by Redis's clock, so that the times of all machines can be compared.
local kind, id, state, lifetime_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local at = now()
local times = string.format('{"heartbeat_at":%.6f,"started_at":%.6f,', at, at - tonumber(ARGV[5]))
redis.call('SET', K[kind] .. id, times .. string.sub(state, 2), 'PX', lifetime_ms)
redis.call('ZADD', K[kind .. 'S'], stamp(at), id)
