-- uses: erase
-- Erases deleted jobs from the archive and from the prefix caches of workers. They may no longer be in Redis.
-- ARGV: API key's id, time since which its prefixes were not used, ids of the jobs
local owner, unused_since = ARGV[1], ARGV[2]
erase({unpack(ARGV, 3)}, owner, unused_since)
