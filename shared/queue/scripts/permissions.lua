-- Finds what the Redis user may not do. Changes nothing.
-- ARGV: a JSON object with
--   keys      one key of each kind that is used
--   probes    commands that read and write a key: a user who may run none of them on a key may not use the key
--   commands  commands with valid arguments
--   In both, the argument `KEY` stands for a key.
-- Returns two JSON arrays: the keys that the user may not use, and the commands that the user may not run.
local request = cjson.decode(ARGV[1])

local function permitted(command, key)
  local words = {}
  for i, word in ipairs(command) do
    words[i] = word == 'KEY' and key or word
  end
  local known, allowed = pcall(redis.acl_check_cmd, unpack(words)) -- raises for a command that the server does not have
  return known and allowed
end

local function usable(key)
  for _, probe in ipairs(request.probes) do
    if permitted(probe, key) then
      return true
    end
  end
  return false
end

local denied_keys, denied_commands, usable_key = {}, {}, nil
for _, key in ipairs(request.keys) do
  if usable(key) then
    usable_key = usable_key or key
  else
    denied_keys[#denied_keys + 1] = key
  end
end
for _, command in ipairs(request.commands) do
  local takes_key = command[2] == 'KEY'
  if (usable_key or not takes_key) and not permitted(command, usable_key) then
    denied_commands[#denied_commands + 1] = command[1]
  end
end
return {cjson.encode(denied_keys), cjson.encode(denied_commands)}
