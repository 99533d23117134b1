-- What a worker tells of itself; it is forgotten when not told again in time.
-- ARGV: worker, its card as JSON, lifetime of the card in ms, moment of the heartbeat
local worker = ARGV[1]
redis.call('SET', K.WORKER .. worker, ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', K.WORKERS, ARGV[4], worker)
