// Request bodies of the playground, and the same request as code.

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"];

function parsed(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${what} is not valid JSON: ${error.message}`);
  }
}

/** Return the options of a request, without its messages. Throws if a field has invalid JSON. */
export function optionsOf(form) {
  const fields = Object.fromEntries(new FormData(form));
  const options = { model: fields.model };
  for (const name of NUMBERS) if (fields[name] !== "") options[name] = Number(fields[name]);
  if (fields.priority !== "normal") options.priority = fields.priority;
  if (fields.enable_thinking) options.enable_thinking = fields.enable_thinking === "true";
  const stops = fields.stop.split(",").map((stop) => stop.trim()).filter(Boolean);
  if (stops.length) options.stop = stops;
  if (fields.schema.trim()) {
    options.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed(fields.schema, "The JSON schema") } };
  }
  if (fields.tools.trim()) options.tools = parsed(fields.tools, "The list of tools");
  return options;
}

/** Return the messages of a conversation as the API takes them. */
export function messagesOf(turns, system) {
  const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const turn of turns) {
    if (turn.role === "user") messages.push({ role: "user", content: contentOf(turn) });
    else if (turn.role === "tool") messages.push({ role: "tool", tool_call_id: turn.call, content: turn.text });
    else if (turn.text || turn.calls?.length) {
      const message = { role: "assistant", content: turn.text || null };
      if (turn.calls?.length) message.tool_calls = turn.calls;
      messages.push(message);
    }
  }
  return messages;
}

function contentOf(turn) {
  if (!turn.images?.length) return turn.text;
  const images = turn.images.map((url) => ({ type: "image_url", image_url: { url } }));
  return turn.text ? [...images, { type: "text", text: turn.text }] : images;
}

const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const shortened = (key, value) => (typeof value === "string" && value.startsWith("data:") && value.length > 80 ? `${value.slice(0, 40)}…` : value);
const json = (value) => JSON.stringify(value, shortened, 2);

/** Write a JSON value as Python. */
function python(value, indent = "    ") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return value.length ? `[\n${value.map((each) => `${indent}    ${python(each, `${indent}    `)},\n`).join("")}${indent}]` : "[]";
  if (typeof value === "object") {
    const pairs = Object.entries(value).map(([name, each]) => `${indent}    ${JSON.stringify(name)}: ${python(shortened(name, each), `${indent}    `)},\n`);
    return pairs.length ? `{\n${pairs.join("")}${indent}}` : "{}";
  }
  return JSON.stringify(value);
}

/** Return the code that sends a request to `POST /v1/jobs` or, with OpenAI's library, to chat completions. */
export function codeFor(language, body, origin) {
  if (language === "curl") {
    return `curl ${origin}/v1/jobs -H "X-API-Key: $MLXQ_API_KEY" \\\n  -H 'Content-Type: application/json' \\\n  -d ${shellQuoted(json(body))}\n\n` +
      `# Then stream the job; after an interruption, continue with -H 'Last-Event-ID: N':\ncurl -N ${origin}/v1/jobs/JOB_ID/stream -H "X-API-Key: $MLXQ_API_KEY"`;
  }
  if (language === "python") {
    return `import os\n\nimport httpx\n\nclient = httpx.Client(\n    base_url="${origin}",\n    headers={"X-API-Key": os.environ["MLXQ_API_KEY"]},\n    timeout=None,\n)\n` +
      `job = client.post("/v1/jobs", json=${python(body, "")}).raise_for_status().json()\n\n` +
      `with client.stream("GET", job["urls"]["stream"], headers={"Accept": "application/x-ndjson"}) as events:\n    for line in events.iter_lines():\n        print(line)`;
  }
  const { parse, top_k, min_p, enable_thinking, priority, ...known } = body;
  const extra = Object.fromEntries(Object.entries({ top_k, min_p, enable_thinking }).filter(([, value]) => value !== undefined));
  const named = { ...known, stream: true, ...(Object.keys(extra).length ? { extra_body: extra } : {}) };
  const lines = Object.entries(named).map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
  return `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1", api_key=os.environ["MLXQ_API_KEY"])\n` +
    `stream = client.chat.completions.create(\n${lines})\nfor chunk in stream:\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="")`;
}
