-- Announces a worker or a worker process; its card expires when it is not announced again in time.
-- ARGV: 'WORKER' or 'HOST', its id, its card as a JSON object that is not empty, lifetime of the card in ms, seconds
-- since it started
-- The moments `heartbeat_at` and `started_at` are added here: cards of all machines have Redis's clock.
local kind, id, card = ARGV[1], ARGV[2], ARGV[3]
local at = now()
local moments = string.format('{"heartbeat_at":%.6f,"started_at":%.6f,', at, at - tonumber(ARGV[5]))
redis.call('SET', K[kind] .. id, moments .. string.sub(card, 2), 'PX', ARGV[4])
redis.call('ZADD', K[kind .. 'S'], stamp(at), id)
