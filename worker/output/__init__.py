"""Messages: splits a model's text into reasoning, content and tool calls, as the model's own format marks them."""
