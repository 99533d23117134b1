-- Makes a model known. A tokenizer that no card names any more is deleted.
-- ARGV: model, its card as JSON, digest of its tokenizer or ''
-- Returns 1 when that tokenizer is not there, else 0.
local model, card, digest = unpack(ARGV)

local function named(tokenizer)
  for _, other in ipairs(redis.call('HVALS', K.MODELS)) do
    if cjson.decode(other).tokenizer == tokenizer then
      return true
    end
  end
  return false
end

local former = redis.call('HGET', K.MODELS, model)
redis.call('HSET', K.MODELS, model, card)
local tokenizer = former and cjson.decode(former).tokenizer
if type(tokenizer) == 'string' and tokenizer ~= digest and not named(tokenizer) then
  redis.call('DEL', K.TOKENIZER .. tokenizer, 'mlxq:tokenizer:' .. tokenizer) -- the second as earlier versions named it
end
return digest ~= '' and redis.call('EXISTS', K.TOKENIZER .. digest) == 0 and 1 or 0
