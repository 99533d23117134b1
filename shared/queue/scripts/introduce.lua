-- Makes a model known.
-- ARGV: model, its card as JSON, digest of its tokenizer or '', tokenizer.json or ''
local model, card, digest, tokenizer = unpack(ARGV)
if digest ~= '' and tokenizer ~= '' then
  redis.call('SET', K.TOKENIZER .. digest, tokenizer)
end
redis.call('HSET', K.MODELS, model, card)
