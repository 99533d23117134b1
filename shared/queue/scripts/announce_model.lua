-- Stores a model's card. Deletes the model's previous tokenizer if no other card names it.
-- ARGV: model, card as JSON, digest of the model's tokenizer or ''
-- Returns 1 if Redis lacks the tokenizer, else 0.
local model, card, digest = unpack(ARGV)

local function is_named(tokenizer)
  for _, other in ipairs(redis.call('HVALS', K.MODELS)) do
    if cjson.decode(other).tokenizer == tokenizer then
      return true
    end
  end
  return false
end

local previous = redis.call('HGET', K.MODELS, model)
redis.call('HSET', K.MODELS, model, card)
local tokenizer = previous and cjson.decode(previous).tokenizer
if type(tokenizer) == 'string' and tokenizer ~= digest and not is_named(tokenizer) then
  redis.call('DEL', K.TOKENIZER .. tokenizer, K.OLD_TOKENIZER .. tokenizer)
end
return digest ~= '' and redis.call('EXISTS', K.TOKENIZER .. digest) == 0 and 1 or 0
