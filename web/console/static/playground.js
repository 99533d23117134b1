// A conversation with a model. Each answer is a job whose native event stream is read, so a reload continues it.

import { call } from "./api.js";
import { copy, toast } from "./notices.js";
import { codeFor, messagesOf, optionsOf } from "./request_code.js";
import { renderTurn } from "./turns.js";

const STORE = "mlxq-playground";
const root = document.querySelector("[data-playground]");
const find = (name) => document.querySelector(`[data-${name}]`);
const [list, composer, prompt, files, parameters, sendButton, stopButton, state] =
  ["turns", "composer", "prompt", "images", "parameters", "send", "stop", "state"].map(find);

let turns = [];
let attached = [];
let stream;

// The conversation outlives a reload, but not the tab.

function save() {
  const fields = Object.fromEntries(new FormData(parameters));
  try {
    sessionStorage.setItem(STORE, JSON.stringify({ turns: turns.map(({ element, ...turn }) => turn), fields }));
  } catch {
    toast("The images are too large to survive a reload of the page.", true);
  }
}

function restore() {
  const stored = JSON.parse(sessionStorage.getItem(STORE) ?? "null");
  if (!stored) return;
  for (const [name, value] of Object.entries(stored.fields)) {
    const field = parameters.elements[name];
    if (field && (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value))) field.value = value;
  }
  for (const turn of stored.turns) add(turn);
  const last = turns.at(-1);
  if (last?.job && !last.ended) follow(last);
}

function add(turn) {
  find("empty")?.remove();
  turns.push(turn);
  turn.element = document.createElement("article");
  list.append(turn.element);
  show(turn);
  return turn;
}

function show(turn) {
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
  renderTurn(turn, answerCalls);
  if (atEnd || turn.role === "user") list.scrollTop = list.scrollHeight;
}

// Sending

function bodyOf(next) {
  const options = optionsOf(parameters);
  return { ...options, messages: messagesOf(next, parameters.elements.system.value), parse: "message" };
}

async function send(added) {
  try {
    const body = bodyOf([...turns, ...added]);
    sendButton.disabled = true;
    const job = await call("POST", "/v1/jobs", body);
    for (const turn of added) add(turn);
    const turn = add({ role: "assistant", job: job.id, text: "", reasoning: "", calls: [], ended: false });
    save();
    follow(turn);
    return true;
  } catch (error) {
    toast(error.message, true);
    sendButton.disabled = false;
    return false;
  }
}

async function sendPrompt() {
  const text = prompt.value.trim();
  if ((!text && !attached.length) || stream) return;
  const images = attached;
  if (await send([{ role: "user", text, images }])) {
    prompt.value = "";
    attached = [];
    showAttached();
  }
}

function answerCalls(results) {
  send(results.map(([call, text]) => ({ role: "tool", call, text })));
}

// Reading an answer. EventSource reconnects by itself and sends the number of the last event.

function follow(turn) {
  Object.assign(turn, { text: "", reasoning: "", calls: [], status: "queued" });
  stream = new EventSource(`/v1/jobs/${turn.job}/stream`);
  stopButton.hidden = false;
  sendButton.disabled = true;
  state.textContent = "Waiting for a worker";
  const began = performance.now();
  stream.addEventListener("started", () => { turn.status = "running"; state.textContent = "Processing the prompt"; });
  stream.addEventListener("resumed", (event) => { state.textContent = `Continues in attempt ${JSON.parse(event.data).attempt}`; });
  stream.addEventListener("queued", () => { state.textContent = "Waiting for a worker"; });
  stream.addEventListener("chunk", (event) => {
    const { text, delta } = JSON.parse(event.data);
    if (!turn.text && !turn.reasoning) state.textContent = `First token after ${((performance.now() - began) / 1000).toFixed(2)} s`;
    turn.reasoning += delta?.reasoning_content ?? "";
    turn.text += delta ? delta.content ?? "" : text;
    for (const each of delta?.tool_calls ?? []) turn.calls.push(each);
    paint(turn);
  });
  stream.addEventListener("done", () => finish(turn));
  stream.onerror = () => {
    if (stream?.readyState === EventSource.CLOSED) finish(turn);
    else state.textContent = "The connection was lost. It is being restored.";
  };
  show(turn);
}

let painting = false;

function paint(turn) {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => { painting = false; show(turn); });
}

async function finish(turn) {
  stream?.close();
  stream = undefined;
  try {
    const job = await call("GET", `/v1/jobs/${turn.job}`);
    Object.assign(turn, { status: job.status, error: job.error?.message, usage: job.usage, timings: job.timings });
    turn.ended = !["queued", "running"].includes(job.status);
    if (job.message) {
      turn.text = job.message.content ?? "";
      turn.reasoning = job.message.reasoning_content ?? turn.reasoning;
      turn.calls = job.message.tool_calls ?? [];
    }
  } catch (error) {
    Object.assign(turn, { ended: true, status: "failed", error: error.message });
  }
  stopButton.hidden = true;
  sendButton.disabled = false;
  state.textContent = "";
  find("announce").textContent = `The answer has ended: ${turn.status}.`;
  show(turn);
  save();
}

async function stop() {
  const turn = turns.at(-1);
  try {
    await call("POST", `/v1/jobs/${turn.job}/cancel`);
  } catch (error) {
    toast(error.message, true);
  }
}

// Images

function attach(chosen) {
  for (const file of chosen) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.addEventListener("load", () => { attached.push(reader.result); showAttached(); });
    reader.readAsDataURL(file);
  }
}

function showAttached() {
  find("attachments").replaceChildren(...attached.map((url, index) => {
    const item = document.createElement("div");
    item.className = "attachment";
    const image = Object.assign(document.createElement("img"), { src: url, alt: `Attached image ${index + 1}` });
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "✕" });
    remove.setAttribute("aria-label", `Remove image ${index + 1}`);
    remove.addEventListener("click", () => { attached.splice(index, 1); showAttached(); });
    item.append(image, remove);
    return item;
  }));
}

// The same request as code

let language = "curl";

function showCode() {
  const pending = prompt.value.trim() || attached.length ? [{ role: "user", text: prompt.value.trim(), images: attached }] : [];
  const shown = [...turns, ...pending];
  while (shown.length && shown.at(-1).role === "assistant") shown.pop();
  try {
    const body = bodyOf(shown.length ? shown : [{ role: "user", text: "Hello" }]);
    find("code-text").textContent = codeFor(language, body, location.origin);
  } catch (error) {
    find("code-text").textContent = error.message;
  }
  for (const tab of document.querySelectorAll("[data-language]")) {
    const selected = tab.dataset.language === language;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    if (selected) find("code-text").setAttribute("aria-labelledby", tab.id);
  }
}

composer.addEventListener("submit", (event) => { event.preventDefault(); sendPrompt(); });
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); sendPrompt(); }
});
prompt.addEventListener("paste", (event) => attach(event.clipboardData.files));
files.addEventListener("change", () => { attach(files.files); files.value = ""; });
root.addEventListener("dragover", (event) => { event.preventDefault(); composer.classList.add("dropping"); });
root.addEventListener("dragleave", () => composer.classList.remove("dropping"));
root.addEventListener("drop", (event) => { event.preventDefault(); composer.classList.remove("dropping"); attach(event.dataTransfer.files); });
parameters.addEventListener("input", save);
parameters.addEventListener("submit", (event) => event.preventDefault());
stopButton.addEventListener("click", stop);
find("new").addEventListener("click", () => { stream?.close(); sessionStorage.removeItem(STORE); location.reload(); });
find("code").addEventListener("click", () => { showCode(); find("code-dialog").showModal(); });
find("copy-code").addEventListener("click", () => copy(find("code-text").textContent));
document.querySelector("[role=tablist]").addEventListener("click", (event) => {
  if (event.target.dataset.language) { language = event.target.dataset.language; showCode(); }
});
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const tabs = [...document.querySelectorAll("[data-language]")];
  const next = (tabs.findIndex((tab) => tab.dataset.language === language) + (event.key === "ArrowRight" ? 1 : tabs.length - 1)) % tabs.length;
  language = tabs[next].dataset.language;
  showCode();
  tabs[next].focus();
});

restore();
