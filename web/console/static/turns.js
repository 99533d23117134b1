// A turn of the conversation as elements of the page.

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Write a turn into its element. `answerCalls` gets pairs of a call's id and its result. */
export function renderTurn(turn, answerCalls) {
  const open = turn.element.querySelector("details")?.open ?? false;
  const streaming = turn.role === "assistant" && !turn.ended;
  turn.element.className = `turn turn-${turn.role === "assistant" ? "assistant" : "user"}${streaming ? " turn-streaming" : ""}`;
  const parts = [head(turn)];
  for (const url of turn.images ?? []) {
    parts.push(Object.assign(element("img", ""), { src: url, alt: "Image of this message" }));
  }
  if (turn.reasoning) parts.push(reasoning(turn, open));
  if (turn.text || streaming) parts.push(element("div", "turn-text", turn.text));
  if (turn.calls?.length) parts.push(calls(turn, answerCalls));
  if (turn.error) parts.push(element("p", "turn-error", turn.error));
  turn.element.replaceChildren(...parts);
}

function head(turn) {
  const line = element("div", "turn-head");
  const names = { user: "You", tool: "Tool result", assistant: "Assistant" };
  line.append(element("strong", "", names[turn.role]));
  if (turn.role !== "assistant") return line;
  const status = turn.status ?? "queued";
  if (status !== "succeeded") line.append(element("span", `badge badge-${status}`, status));
  const link = element("a", "", "job");
  link.href = `/console/jobs/${turn.job}`;
  line.append(link);
  if (turn.usage?.completion_tokens) line.append(element("span", "", figures(turn)));
  return line;
}

function figures({ usage, timings }) {
  const seconds = (timings.total_s ?? 0) - (timings.first_token_s ?? 0);
  const speed = seconds > 0 && usage.completion_tokens > 1 ? ` · ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tok/s` : "";
  return `${usage.prompt_tokens ?? "?"} + ${usage.completion_tokens} tokens${speed}`;
}

function reasoning(turn, open) {
  const folded = element("details", "");
  folded.open = open;
  folded.append(element("summary", "", turn.text || turn.ended ? "Reasoning" : "Reasoning …"), element("div", "turn-text", turn.reasoning));
  return folded;
}

function calls(turn, answerCalls) {
  const form = element("form", "tool-calls");
  for (const call of turn.calls) {
    form.append(element("pre", "wrap", `${call.function.name}(${call.function.arguments})`));
    if (!turn.ended) continue;
    const label = element("label", "", `Result of ${call.function.name}`);
    const field = element("textarea", "");
    field.name = call.id;
    field.rows = 2;
    label.append(field);
    form.append(label);
  }
  if (turn.ended) form.append(element("button", "small", "Send the results"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    answerCalls([...new FormData(form)]);
  });
  return form;
}
