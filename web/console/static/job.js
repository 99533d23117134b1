// Log replay: the events of a job, and the text that had been written by each of them.

import { toast } from "./notices.js";

const PLAY_MS = 6000;
const section = document.querySelector("[data-log]");
const part = (name) => section.querySelector(`[data-replay-${name}]`);
const [loadButton, playButton, position, list, text, at] = ["load", "play", "position", "events", "text", "at"].map(part);
let events = [];
let timer;

async function load() {
  loadButton.disabled = true;
  const answer = await fetch(section.dataset.log, { headers: { Accept: "application/x-ndjson" } });
  if (!answer.ok || !answer.body) {
    const problem = answer.status === 204 ? undefined : await answer.json().catch(() => undefined);
    toast(problem?.detail ?? "The events are no longer stored.", true);
    return;
  }
  section.querySelector(".replay").hidden = false;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    const atEnd = Number(position.value) >= events.length;
    for (const line of lines) if (line.trim()) add(JSON.parse(line));
    position.max = String(Math.max(events.length, 1));
    if (atEnd) show(events.length);
    position.disabled = playButton.disabled = events.length === 0;
    if (done) return;
  }
}

function add(line) {
  const { event: kind, data } = line;
  if (!data) return; // a heartbeat, or a hint to reconnect
  events.push({ kind, text: data.text ?? "" });
  const item = document.createElement("li");
  const name = document.createElement("span");
  name.textContent = `${events.length} ${kind}`;
  const detail = document.createElement("span");
  detail.textContent = kind === "chunk" ? data.text ?? "" : data.reason ?? data.status ?? (data.attempt ? `attempt ${data.attempt}` : "");
  item.append(name, detail);
  list.append(item);
}

function show(count) {
  position.value = String(count);
  text.textContent = events.slice(0, count).map((event) => event.text).join("");
  at.textContent = `${count} of ${events.length}`;
  list.querySelector("[aria-current]")?.removeAttribute("aria-current");
  const current = list.children[count - 1];
  if (!current) return;
  current.setAttribute("aria-current", "true");
  list.scrollTop = current.offsetTop - list.offsetTop - list.clientHeight / 2;
}

function play() {
  if (timer) return stop();
  let count = Number(position.value) >= events.length ? 0 : Number(position.value);
  const step = Math.max(1, Math.ceil(events.length / 200));
  playButton.textContent = "Pause";
  timer = setInterval(() => {
    count = Math.min(count + step, events.length);
    show(count);
    if (count === events.length) stop();
  }, PLAY_MS / Math.min(events.length, 200));
}

function stop() {
  clearInterval(timer);
  timer = undefined;
  playButton.textContent = "Play";
}

loadButton.addEventListener("click", load);
playButton.addEventListener("click", play);
position.addEventListener("input", () => { stop(); show(Number(position.value)); });
